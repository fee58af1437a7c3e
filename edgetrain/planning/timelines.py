"""What lives on the device in the course of a run: the dry run's timelines, made short enough to be kept."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import groupby
from typing import Any

from numpy.typing import NDArray

from edgetrain.memory.timeline import thinned
from edgetrain.nets.base import Net
from edgetrain.planning.dryrun import Bench, visited, visited_all
from edgetrain.planning.plan import Plan
from edgetrain.planning.planner import backprop_work
from edgetrain.planning.workload import Workload
from edgetrain.record import MemorySeries
from edgetrain.units import MIB, to_mb

_POINTS = 600  # of a whole run,
_MOST, _LEAST = 96, 8  # and of a visit
DEEPEST = 64  # cells of a net whose backpropagation is tried as a whole


def of_run(work: Workload, plan: Plan) -> list[MemorySeries]:
    """Of each visit of a run, equal visits in a row once; under ``sequence`` those of one epoch, resident of two."""
    if plan.placement == "resident":
        return _of_resident(work, plan)
    found: list[MemorySeries] = []
    groups = [list(group) for _, group in groupby(range(len(plan.visits)), key=lambda node: _kind(work, plan, node))]
    points = max(_LEAST, min(_MOST, _POINTS // len(groups)))
    for group in groups:
        node, cell = group[0], plan.visits[group[0]]
        table = visited(work, node, cell.micro_batch, cell.tiles, plan.classifier_resident)
        found.append(_series(cell.name, len(group), table, points, node + 1))
    return found


def of_backpropagation(work: Workload, net: Net) -> MemorySeries | None:
    """Of plain backpropagation on the same net; ``None`` where that fails or the net is too deep for it."""
    if len(net.cells) > DEEPEST:
        return None
    try:
        table = visited(backprop_work(work, net), 0, work.batch_size)
    except RuntimeError:  # see ``planner.backprop_peak``
        return None
    return _series("whole net", 1, table, 2 * _MOST)


def _of_resident(work: Workload, plan: Plan) -> list[MemorySeries]:
    table, visits = visited_all(work, plan.micro_batches)
    live = table.timeline.bytes_by_kind()
    points, first, found = max(_LEAST, min(_MOST, _POINTS // len(visits))), 0, []
    for visit in visits:
        stretch, first = live[first : visit.last], visit.last
        at = f"{visit.operation} (cell {visit.node + 1})"
        found.append(_of(plan.visits[visit.node].name, 1, stretch, at, points, visit.node + 1))
    return found


def _series(name: str, count: int, table: Bench, points: int, first: int = 1) -> MemorySeries:
    at = f"{table.tracker.peak_operation} {table.timeline.peak_phase}"
    return _of(name, count, table.timeline.bytes_by_kind(), at, points, first)


def _of(name: str, count: int, live: NDArray[Any], at: str, points: int, first: int) -> MemorySeries:
    kept = thinned(live, points)
    return MemorySeries(name, count, to_mb(int(live.sum(1).max())) or 0.0, at, (kept / MIB).round(4).tolist(), first)


def _kind(work: Workload, plan: Plan, node: int) -> Hashable:
    """Equal for visits that are the same program."""
    cell = plan.visits[node]
    if node == work.depth:
        return cell.name
    return work.kind(node), cell.micro_batch, cell.tiles
