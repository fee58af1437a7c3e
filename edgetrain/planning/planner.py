"""Chooses micro-batches and placement so that the predicted peak fits the budget.

Within the budget the largest micro-batch wins, then the placement that moves less: on a GPU all that
fits stays there. On the CPU nothing is gained by keeping what lies in files in memory as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod

import torch

from edgetrain.baselines.backprop import Backpropagation
from edgetrain.baselines.whole import joined
from edgetrain.errors import BudgetError, InputError
from edgetrain.nets.base import CellRecipe, Options
from edgetrain.objectives.base import nodes
from edgetrain.planning import storage
from edgetrain.planning.dryrun import cell_peak, readout_peak, resident_peak
from edgetrain.planning.plan import CellPlan, Plan
from edgetrain.planning.workload import Workload
from edgetrain.stream.tiles import cuts
from edgetrain.units import MIB, ceil_mb, show_mb

_REPEATS = (3, 4)  # copies of equal cells from which backpropagation's peak is extrapolated
_RESIDENT_CELLS = 64  # beyond that, a resident plan is not worth the time to check


def make_plan(
    work: Workload,
    budget: int | None,
    placement: str = "auto",
    micro_batch: int | list[int] | None = None,
    tiles: int | list[int] | None = None,
    host_budget: int | None = None,
    disk_budget: int | None = None,
) -> Plan:
    """The plan of a run; it may say that the run does not fit.

    Args:
        work: the run.
        budget: device bytes, or ``None`` for no limit.
        placement: ``auto``, ``stream`` or ``resident``.
        micro_batch: asked for by the user, for all or each; ``None``: the largest that fits.
        tiles: of cells, asked for by the user; ``None``: one if that fits.
        host_budget: host bytes, or ``None``.
        disk_budget: disk bytes, or ``None``.

    Raises:
        InputError: micro-batches or tiles were asked for where they cannot be.
    """
    chooser = _Chooser(work, budget, _asked(work, micro_batch), _asked_tiles(work, tiles))
    cells = tuple(chooser.cell(index) for index in range(work.depth))
    readout, readout_resident = chooser.readout(lean=placement == "stream")
    visits = cells if readout is None else (*cells, readout)
    peak = max(cell.peak for cell in visits)
    chosen = "stream"
    tiled = any(cell.tiles > 1 for cell in cells)
    if placement == "resident" and tiled:
        raise InputError("--placement resident: cells in tiles come from the host; leave one of the two out")
    if placement == "resident" or (
        placement == "auto" and work.device.type == "cuda" and work.depth <= _RESIDENT_CELLS and not tiled
    ):
        whole, peaks = resident_peak(work, [cell.micro_batch for cell in visits])
        if placement == "resident" or budget is None or whole <= budget:
            chosen, peak, readout_resident = "resident", whole, True
            cells = tuple(replace(cell, peak=peaks[index]) for index, cell in enumerate(cells))
            readout = None if readout is None else replace(readout, peak=peaks[-1])
    params = [cell.params for cell in visits]
    over = budget is not None and peak > budget
    return Plan(
        cells=cells,
        readout=readout,
        placement=chosen,
        readout_resident=readout_resident,
        budget=budget,
        min_budget=chooser.least if chosen == "stream" else peak,
        predicted_peak=peak,
        host_bytes=storage.host_bytes(work, params),
        host_budget=host_budget,
        disk_bytes=storage.disk_bytes(work, sum(params), chosen),
        disk_budget=disk_budget,
        written_bytes=storage.written_bytes(work, sum(params), chosen),
        whole_batch=_whole_batch(work, budget) if over else None,
    )


def require_fit(plan: Plan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        BudgetError: names the limit, what was asked, and the smallest that would do.
        InputError: only the batch is too large, and it cannot be split.
    """
    if plan.whole_batch is not None:
        raise InputError(
            f"--batch-size is too large for --max-gpu-mb {(plan.budget or 0) / MIB:.4g}, and the samples of a batch"
            f" influence each other here, so that it cannot be split: state --batch-size {plan.whole_batch}"
        )
    if not plan.fits and plan.budget is not None:
        worst = max(plan.visits, key=lambda cell: cell.peak)
        raise BudgetError(
            f"--max-gpu-mb {plan.budget / MIB:.4g} cannot hold {worst.name!r}, which needs {show_mb(worst.peak)} at"
            f" micro-batch {worst.micro_batch}{_in_tiles(worst)}; the smallest budget for this run is"
            f" {ceil_mb(plan.min_budget):.2f} MiB"
        )
    if not plan.host_fits:
        raise BudgetError(
            f"--max-host-mb {(plan.host_budget or 0) / MIB:.4g} is too little for batches and two cells in transit,"
            f" which need {ceil_mb(plan.host_bytes):.2f} MiB; raise it or take a smaller --batch-size"
        )
    if not plan.disk_fits:
        raise BudgetError(
            f"--max-disk-gb {(plan.disk_budget or 0) / (1 << 30):.3g} cannot hold the run folder:"
            f" {show_mb(plan.disk_bytes)}; raise it or use --latent-dtype uint8"
        )


def _in_tiles(cell: CellPlan) -> str:
    if cell.tiles > 1:
        return f" in {cell.tiles} tiles"
    return "" if cell.tileable else " (it cannot be trained in tiles)"


def _whole_batch(work: Workload, budget: int | None) -> int | None:
    """The largest batch, halving from the run's, that fits where cells take batches whole."""
    if not any(work.couples_batch(index) for index in range(work.depth)):
        return None
    size = min(work.batch_size, work.rows) // 2
    while size > 1:
        smaller = replace(work, batch_size=size)
        chooser = _Chooser(smaller, budget, None, None)
        if all(chooser.fits(chooser.cell(index).peak) for index in range(work.depth)):
            return size
        size //= 2
    return None


def backprop_peak(work: Workload, recipes: Sequence[CellRecipe], options: Options) -> int:
    """Peak device bytes of plain backpropagation on the same net, batch and optimizer.

    A long row of equal cells adds the same with every cell, so its peak is found from short rows.
    """
    runs = [list(group) for _, group in groupby(recipes, key=lambda recipe: recipe.signature)]
    short = [run[: _REPEATS[0]] for run in runs]
    base = _backprop(work, [recipe for run in short for recipe in run], options)
    total = base
    for number, run in enumerate(runs):
        if len(run) > _REPEATS[0]:
            longer = [*short[:number], run[: _REPEATS[1]], *short[number + 1 :]]
            step = _backprop(work, [recipe for part in longer for recipe in part], options) - base
            total += step * (len(run) - _REPEATS[0])
    return total


def _backprop(work: Workload, recipes: list[CellRecipe], options: Options) -> int:
    whole = nodes([joined(recipes)], recipes[0].in_shape, work.seed)
    baseline = replace(
        work,
        nodes=tuple(whole),
        objective=Backpropagation(work.classes, options),
        readout=None,
        readout_epochs=0,
    )
    return cell_peak(baseline, 0, work.batch_size)


def _readout_at(work: Workload, resident: bool, size: int) -> int:
    return readout_peak(work, size, resident)


def _asked(work: Workload, micro_batch: int | list[int] | None) -> list[int] | None:
    if micro_batch is None:
        return None
    visits = work.depth + (work.readout is not None)
    asked = [micro_batch] * visits if isinstance(micro_batch, int) else micro_batch
    if len(asked) != visits:
        raise InputError(f"micro_batch lists {len(asked)} numbers; expected {visits}, one for each cell")
    size = min(work.batch_size, work.rows)
    for index in range(work.depth):
        if asked[index] < size and work.couples_batch(index):
            raise InputError(
                f"--micro-batch {asked[index]}: the samples of a batch influence each other in cell {index}"
                "; it takes batches whole"
            )
    return [min(each, size) for each in asked]


def _asked_tiles(work: Workload, tiles: int | list[int] | None) -> list[int] | None:
    if tiles is None:
        return None
    asked = tiles if isinstance(tiles, list) else [tiles] * work.depth
    if len(asked) not in (work.depth, work.depth + (work.readout is not None)):
        raise InputError(f"tiles lists {len(asked)} numbers; expected {work.depth}, one for each cell")
    for node, each in zip(work.nodes, asked, strict=False):
        if each > 1 and not work.objective.tileable(node):
            raise InputError(
                f"--tiles {each}: cell {node.index + 1} cannot be trained in tiles by {work.objective.name}; they are"
                " for dense cells without dropout and batch normalisation, by mf, lbp-ae, sll, ff or symba"
            )
    return asked


@dataclass(frozen=True)
class _Choice:
    """How a kind of cell is trained: peak is that of the choice, least that of the leanest there is."""

    params: int
    micro: int
    tiles: int
    peak: int
    least: int


class _Chooser:
    """Finds for each node the largest micro-batch that fits, looking at each kind of cell once.

    A cell that does not fit in any micro-batch is cut into tiles: as few as allow the largest micro-batch.
    """

    def __init__(self, work: Workload, budget: int | None, asked: list[int] | None, tiles: list[int] | None):
        self.least = 0
        self._work, self._budget, self._asked, self._tiles = work, budget, asked, tiles
        self._known: dict[Hashable, _Choice] = {}

    def cell(self, index: int) -> CellPlan:
        """The plan of a cell."""
        work, node = self._work, self._work.nodes[index]
        assert node.recipe is not None
        assert node.parent is not None
        kind = (
            node.recipe.signature,
            node.parent.shape,
            index == 0,
            work.hands_on(index),
            self._asked and self._asked[index],
            self._tiles and self._tiles[index],
        )
        if kind not in self._known:
            self._known[kind] = self._choose(index)
        found = self._known[kind]
        self.least = max(self.least, found.least)
        latents, tileable = storage.latent_bytes(work, index), work.objective.tileable(node)
        return CellPlan(node.recipe.name, found.params, found.micro, found.peak, latents, found.tiles, tileable)

    def _choose(self, index: int) -> _Choice:
        work, node = self._work, self._work.nodes[index]
        assert node.recipe is not None
        with torch.device("meta"):
            head = work.objective.head(node)
        params = node.recipe.parameters() + (0 if head is None else sum(value.numel() for value in head.parameters()))
        sizes = self._sizes(self._asked[index] if self._asked else None, work.couples_batch(index))
        units = prod(node.shape)
        if self._tiles is not None:
            tiles = len(cuts(units, self._tiles[index]))
            return _Choice(params, tiles=tiles, **self._in(index, tiles, sizes))
        whole = _Choice(params, tiles=1, **self._in(index, 1, sizes))
        most = len(cuts(units, units))
        if most == 1 or not work.objective.tileable(node):
            return whole
        return self._cut(index, sizes, whole, most)

    def _cut(self, index: int, sizes: list[int], whole: _Choice, most: int) -> _Choice:
        """The cell whole if that fits, else in as few tiles as allow the largest micro-batch, at most ``most``."""
        units, chosen = prod(self._work.nodes[index].shape), None
        leanest = _Choice(whole.params, tiles=most, **self._in(index, most, sizes))
        least = min(whole.least, leanest.least)
        if self.fits(whole.peak):
            return replace(whole, least=least)
        asked = 2
        while asked < 2 * most and (chosen is None or chosen.micro < sizes[0]):
            tiles = len(cuts(units, min(asked, most)))
            better = [size for size in sizes if chosen is None or size > chosen.micro]
            found = _Choice(whole.params, tiles=tiles, **self._in(index, tiles, better))
            chosen = found if self.fits(found.peak) else chosen
            asked *= 2
        return replace(chosen or min(whole, leanest, key=lambda choice: choice.peak), least=least)

    def _in(self, index: int, tiles: int, sizes: list[int]) -> dict[str, int]:
        """Micro-batch, peak and least peak of a cell in so many tiles."""

        def peak_at(size: int) -> int:
            more = (tiles,) if tiles > 1 else ()
            return cell_peak(self._work, index, size, *more)

        micro, peak, least = self._largest(sizes, peak_at)
        return {"micro": micro, "peak": peak, "least": least}

    def readout(self, lean: bool) -> tuple[CellPlan | None, bool]:
        """The plan of the trained classifier, and whether it stays on the device as a whole."""
        work = self._work
        if work.readout is None:
            return None, False
        sizes = self._sizes(self._asked[-1] if self._asked else None, couples=False)
        params = work.classes * (sum(work.feature_widths) + 1)
        streamed = self._largest(sizes, partial(_readout_at, work, False))
        whole = streamed if lean else self._largest(sizes, partial(_readout_at, work, True))
        self.least = max(self.least, min(streamed[2], whole[2]))
        resident = not lean and self.fits(whole[1])
        micro, peak, _ = whole if resident else streamed
        return CellPlan("classifier", params, micro, peak, 0), resident

    def _sizes(self, fixed: int | None, couples: bool) -> list[int]:
        """Micro-batches to try, largest first."""
        size = min(self._work.batch_size, self._work.rows)
        if fixed is not None:
            return [fixed]
        if couples:
            return [size]
        halves = [size]
        while halves[-1] > 1:
            halves.append(-(-halves[-1] // 2))
        return halves

    def _largest(self, sizes: list[int], peak_at: Callable[[int], int]) -> tuple[int, int, int]:
        """The first size that fits (or the leanest), its peak, and the least peak of all sizes.

        Splitting a batch first costs memory, because gradients are summed up beside the new ones; from
        there on smaller is leaner. So the least peak is that of the whole batch or of the smallest part.
        """
        peaks = {size: peak_at(size) for size in {sizes[0], sizes[-1]}}
        leanest = min(peaks, key=lambda size: (peaks[size], -size))
        chosen = next((size for size in (sizes[0], sizes[-1]) if self.fits(peaks[size])), leanest)
        if chosen != sizes[0] and chosen == sizes[-1]:
            between = sizes[1:-1]
            while between:
                middle = len(between) // 2
                peaks[between[middle]] = peak_at(between[middle])
                if self.fits(peaks[between[middle]]):
                    chosen, between = between[middle], between[:middle]
                else:
                    between = between[middle + 1 :]
        return chosen, peaks[chosen], peaks[leanest]

    def fits(self, peak: int) -> bool:
        """Whether the budget holds it."""
        return self._budget is None or peak <= self._budget
