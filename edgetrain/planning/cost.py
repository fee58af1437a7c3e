"""The work of a visit, counted operation by operation in a dry run, and the time that it takes.

An operation takes the time of its arithmetic or of the bytes that it touches, whichever is longer (a
roofline), and a call's. Steps of one and of two micro-batches tell what a step of any number of them takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from edgetrain.memory.rates import Rates
from edgetrain.planning.dryrun import bench, emitting, place, stepping
from edgetrain.planning.plan import CellPlan, Plan, VisitTime
from edgetrain.planning.workload import Workload

_LOOKED_AT_TILES = 3  # a dry run makes no more of a cell's equal tiles
_LAYER_BYTES = 28  # that travel for a parameter in a step: its weight forward, with two moments there and back again


class OperationTime(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Seconds that operations would take at a machine's rates, summed up.

    Args:
        rates: of the machine.
        overlaps: whether calls return while the device computes (CUDA).
    """

    def __init__(self, rates: Rates, overlaps: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0
        self.calls = self.flops = 0
        self._rates, self._overlaps = rates, overlaps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _computes(func):
            self._add(func, args, kwargs, out)
        return out

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        touched = sum(value.nbytes for value in tree_iter((args, kwargs, out)) if isinstance(value, torch.Tensor))
        work = max(flops / self._rates.flops, touched / self._rates.memory)
        self.seconds += max(work, self._rates.call_s) if self._overlaps else work + self._rates.call_s
        self.flops += flops
        self.calls += 1


def _computes(func: Any) -> bool:
    """Whether an operation does more than give a tensor another name."""
    if func.namespace != "aten":
        return False
    returned = func._schema.returns
    alias = returned[0].alias_info if returned else None
    return alias is None or alias.is_write


@dataclass(frozen=True)
class _Work:
    """Seconds of arithmetic, and bytes over the bus and from and to the disk."""

    compute: float
    bus: int
    read: int
    written: int

    def time(self, rates: Rates, cached: bool) -> VisitTime:
        read = rates.memory if cached or rates.disk_read is None else rates.disk_read
        disk = self.read / read + (0.0 if rates.disk_write is None else self.written / rates.disk_write)
        parts = {"compute": self.compute, "bus": 0.0 if rates.bus is None else self.bus / rates.bus, "disk": disk}
        bound = max(parts, key=lambda name: parts[name])
        return VisitTime(parts[bound], bound)


def visit_times(work: Workload, plan: Plan, rates: Rates, page_cache: int) -> list[VisitTime]:
    """Of each cell and of the classifier; streams run beside the computation, so the slowest counts.

    Args:
        work: the run.
        plan: its plan.
        rates: of the machine.
        page_cache: bytes of host memory that files may stay in; what fits is read at memory's rate.
    """
    known: dict[object, _Work] = {}
    cached = plan.disk_bytes <= page_cache
    found = []
    for index, cell in enumerate(plan.cells):
        kind = work.kind(index), cell.micro_batch, cell.tiles
        if kind not in known:
            known[kind] = _cell_work(work, index, cell, plan, rates)
        found.append(known[kind].time(rates, cached))
    if plan.classifier is not None:
        found.append(_classifier_work(work, plan.classifier, plan, rates).time(rates, cached))
    return found


def _cell_work(work: Workload, index: int, cell: CellPlan, plan: Plan, rates: Rates) -> _Work:
    emits, phases = work.emits(index), _reads(work, cell)
    training = _per_step(work, cell.micro_batch, lambda of, steps: _seconds(of, index, cell, steps, rates, stepping))
    passes = _passes(work, index, plan)
    compute = work.epochs * training
    if passes:
        compute += passes * _per_step(
            work, cell.micro_batch, lambda of, steps: _seconds(of, index, cell, steps, rates, emitting)
        )
    compute *= cell.tiles / min(cell.tiles, _LOOKED_AT_TILES) * work.rows / work.batch_size
    if work.streams_layers:
        moved = work.epochs * work.rows / work.batch_size * _LAYER_BYTES * cell.params
        compute += 2 * moved / rates.memory if rates.bus is None else 0.0  # read here, written there
        return _Work(compute, round(moved), 0, 0)
    row, out = work.row_bytes_into(index), work.row_bytes_into(index + 1) if emits else 0
    emissions = passes + (work.epochs if emits and work.emits_in_training else 0)
    if plan.placement == "resident":
        return _Work(compute, 0, 0, 0)
    bus = work.rows * ((work.epochs * phases + passes) * row + emissions * out)
    return _Work(compute, bus, work.rows * (work.epochs + passes) * row, work.rows * emissions * out)


def _reads(work: Workload, cell: CellPlan) -> int:
    """How often a step reads its batch."""
    return len(work.objective.phases) if cell.tiles == 1 else 2 * cell.tiles + 1


def _passes(work: Workload, index: int, plan: Plan) -> int:
    """How often the finished cell emits the latents of all samples."""
    if work.emits_in_training or not work.emits(index):
        return 0
    if plan.cut.cached is None:
        return work.views
    later = 0
    for node in range(index + 1, work.depth):
        if node in plan.cut.cached:
            return later * work.epochs + 1
        later += 1
    return later * work.epochs + (work.classifier_epochs if index <= max(work.classifier_reads, default=-1) else 0)


def _classifier_work(work: Workload, classifier: CellPlan, plan: Plan, rates: Rates) -> _Work:
    def seconds(of: Workload, steps: int) -> float:
        clock = _clock(of, rates)
        with bench(of.device) as table, clock:
            cell = place(of, of.depth, table, resident=plan.classifier_resident)
            stepping(of, of.depth, classifier.micro_batch, table, cell, steps)
        return clock.seconds

    steps = work.rows / work.batch_size
    compute = work.classifier_epochs * steps * _per_step(work, classifier.micro_batch, seconds)
    row = sum(work.format_into(index + 1).row_bytes for index in work.classifier_reads)
    moved = 0 if plan.placement == "resident" else work.classifier_epochs * work.rows * row
    return _Work(compute, moved, moved, 0)


def _seconds(
    work: Workload, index: int, cell: CellPlan, steps: int, rates: Rates, carry_out: Callable[..., None]
) -> float:
    """Of some steps of a cell, training or emitting."""
    clock = _clock(work, rates)
    with bench(work.device, work.needs_values(index)) as table:
        placed = place(work, index, table, cell.tiles)
        with clock:
            carry_out(work, index, cell.micro_batch, table, placed, steps)
    return clock.seconds


def _clock(work: Workload, rates: Rates) -> OperationTime:
    return OperationTime(rates, overlaps=work.device.type == "cuda")


def _per_step(work: Workload, micro_batch: int, seconds: Callable[[Workload, int], float]) -> float:
    """Seconds of a step, from steps of one and of two micro-batches; the second step of two is a steady one."""
    size = min(micro_batch, work.batch_size, work.rows)
    pieces = math.ceil(min(work.batch_size, work.rows) / size)

    def steady(parts: int) -> float:
        small = replace(work, batch_size=parts * size, rows=2 * parts * size)
        return seconds(small, 2) - seconds(small, 1)

    one = steady(1)
    return one if pieces == 1 else one + (pieces - 1) * (steady(2) - one)
