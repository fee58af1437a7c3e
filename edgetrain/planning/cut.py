"""Latents that the disk cannot hold: how to cut epochs into ranges, and what is worth caching whole.

Under ``sequence`` the latents of a range of steps come from weights that change with every step: visits
are shortened, so that only a range is on disk at once. Under ``separate`` finished cells can emit again
whatever a later cell reads. Which latents to cache whole instead is a shortest path over the cells: the
state is the last cached latents, the price of a cell is the work of emitting its inputs again in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgetrain.nets.base import CellRecipe
from edgetrain.planning.schedule import WHOLE, Cut
from edgetrain.planning.workload import Workload
from edgetrain.store.rows import RowFormat


def latents_held(work: Workload, cut: Cut) -> int:
    """The most bytes of training latents that are on disk at once.

    Under ``sequence`` the newest checkpoint keeps its latents while those that follow are written.
    """
    if work.schedule == "separate" and cut.cached is not None:
        return _held_again(work, cut.cached, work.range_rows(cut))
    rows = work.range_rows(cut) * work.views * (2 if work.emits_in_training else 1)
    sizes = [rows * size for size in _row_bytes(work)[1:]]
    if work.keep_latents:
        return sum(sizes)
    kept = [sizes[index] if index in work.classifier_reads else 0 for index in range(work.depth)]
    return max(sum(kept[:index]) + sum(sizes[index : index + 2]) for index in range(work.depth))


def latents_written(work: Workload, cut: Cut) -> int:
    """Bytes of training latents that the run writes in all."""
    sizes = [work.rows * size for size in _row_bytes(work)]
    if work.schedule == "separate" and cut.cached is not None:
        return _written_again(work, cut.cached, sizes)
    return (work.epochs if work.emits_in_training else work.views) * sum(sizes)


def choose_cut(work: Workload, room: int) -> Cut | None:
    """How latents fit into ``room`` bytes at the least cost; ``None``: not at all.

    Caching everything comes first, then as few ranges as will do.
    """
    if latents_held(work, WHOLE) <= room:
        return WHOLE
    if work.keep_latents or (work.depth == 1 and work.classifier is None):
        return None
    if work.emits_in_training:
        cuts = (Cut(ranges) for ranges in _halvings(work.steps))
        return next((cut for cut in cuts if latents_held(work, cut) <= room), None)
    if work.views > 1:
        return None
    found = [_cheapest(work, ranges, room) for ranges in _halvings(work.steps)]
    paths = [
        (path.cost, ranges, path.cached) for path, ranges in zip(found, _halvings(work.steps), strict=True) if path
    ]
    if not paths:
        return None
    _, ranges, cached = min(paths, key=lambda path: path[:2])
    return Cut(ranges, frozenset(cached))


def least_room(work: Workload) -> int:
    """The least bytes of disk that training latents can do with."""
    if work.keep_latents:
        return latents_held(work, WHOLE)
    cuts = [WHOLE, *([Cut(work.steps)] if work.emits_in_training else [])]
    if not work.emits_in_training and work.views == 1:
        cuts.append(Cut(work.steps, frozenset({0})))
    return min(latents_held(work, cut) for cut in cuts)


def _halvings(steps: int) -> list[int]:
    """Numbers of ranges to try."""
    return [*(1 << power for power in range((steps - 1).bit_length())), steps]


def _row_bytes(work: Workload) -> list[int]:
    """Bytes of a sample by number of the latents; 0 for latents that are not read, and for the inputs."""
    return [0, *(work.row_bytes_into(index + 1) if work.emits(index) else 0 for index in range(work.depth))]


@dataclass(frozen=True)
class _Path:
    """Cells trained so far: what emitting again cost, what is cached, and the most bytes a sample of a chain."""

    cost: float
    cached: tuple[int, ...]
    chain: int = 0

    @property
    def base(self) -> int:
        return self.cached[-1]


def _cheapest(work: Workload, ranges: int, room: int) -> _Path | None:
    rows, sizes = work.range_rows(Cut(ranges)), _row_bytes(work)
    done = list(accumulate(_emission_flops(work), initial=0))  # of the cells before a node
    paths = {0: _Path(0.0, (0,))}
    for node in range(work.depth):
        after: dict[int, _Path] = {}
        for path in paths.values():
            base = path.base
            chain = max(path.chain, sum(sizes[max(base + 1, node - 1) : node + 1])) if node > base else 0
            held = work.rows * sizes[base] + rows * chain
            if held > room:
                continue
            _keep(after, _Path(path.cost + work.epochs * (done[node] - done[base]), path.cached, chain))
            if node < work.depth - 1 and held + work.rows * sizes[node + 1] <= room:
                cost = path.cost + (work.epochs + 1) * (done[node] - done[base])
                _keep(after, _Path(cost, (*path.cached, node + 1)))
        paths = after
    if work.classifier is not None and rows * _held_for_classifier(work, sizes) > room:
        return None
    return min(paths.values(), key=lambda path: path.cost, default=None)


def _keep(paths: dict[int, _Path], path: _Path) -> None:
    """The cheaper of two with the same last cached latents."""
    if path.base not in paths or path.cost < paths[path.base].cost:
        paths[path.base] = path


def _bases(work: Workload, cached: frozenset[int]) -> Iterator[tuple[int, int, bool]]:
    """(node, the last cached latents that its inputs come from, whether its own latents are cached)."""
    base = 0
    for node in range(work.depth):
        caches = node + 1 in cached and node < work.depth - 1
        yield node, base, caches
        base = node + 1 if caches else base


def _held_again(work: Workload, cached: frozenset[int], rows: int) -> int:
    sizes, most = _row_bytes(work), 0
    for node, base, caches in _bases(work, cached):
        chain = sizes[base + 1 : node + 1]
        pairs = max((sum(pair) for pair in pairwise([0, *chain])), default=0)
        most = max(most, work.rows * (sizes[base] + caches * sizes[node + 1]) + rows * pairs)
    return max(most, rows * _held_for_classifier(work, sizes)) if work.classifier is not None else most


def _held_for_classifier(work: Workload, sizes: list[int]) -> int:
    """Bytes of a sample: what the classifier reads, and two others on the way there."""
    reads = {index + 1 for index in work.classifier_reads}
    others = [0 if index in reads else size for index, size in enumerate(sizes)]
    return sum(sizes[index] for index in reads) + max(map(sum, pairwise(others)))


def _written_again(work: Workload, cached: frozenset[int], sizes: list[int]) -> int:
    total = 0
    for node, base, caches in _bases(work, cached):
        chain = sum(sizes[base + 1 : node + 1])
        total += work.epochs * chain + (chain + sizes[node + 1]) * caches
    reads = work.classifier_reads
    return total + work.classifier_epochs * sum(sizes[: max(reads) + 2]) if reads else total


def _emission_flops(work: Workload) -> list[int]:
    """Floating-point operations for one sample to pass each cell."""
    known: dict[object, int] = {}
    found = []
    for node in work.nodes:
        if node.recipe.signature not in known:
            layout = replace(work.inputs if node.index == 0 else RowFormat(()), shape=node.recipe.in_shape)
            known[node.recipe.signature] = forward_flops(node.recipe, layout)
        found.append(known[node.recipe.signature])
    return found


def forward_flops(recipe: CellRecipe, layout: RowFormat) -> int:
    """Floating-point operations for one sample to pass a cell that reads rows of a layout."""
    device = "cpu" if recipe.needs_values else "meta"
    with torch.device(device), FlopCounterMode(display=False) as counter, torch.no_grad():
        row = layout.decode(torch.zeros(1, layout.row_bytes, dtype=torch.uint8))
        recipe.build().eval()(row)
    return max(int(counter.get_total_flops()), 1)
