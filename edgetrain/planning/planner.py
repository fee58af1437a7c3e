"""Chooses micro-batches and placement so that the predicted peak fits the budget.

Within the budget the largest micro-batch wins, then the placement that moves less: on a GPU all that
fits stays there. On the CPU nothing is gained by keeping what lies in files in memory as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, islice
from math import prod
from typing import Literal

import torch

from edgetrain.baselines.backprop import Backpropagation
from edgetrain.baselines.whole import joined
from edgetrain.errors import BudgetError, InputError
from edgetrain.nets.base import Net
from edgetrain.objectives.base import nodes
from edgetrain.planning import storage
from edgetrain.planning.dryrun import Peak, cell_peak, refusal_of_one_row, resident_peak
from edgetrain.planning.plan import CellPlan, Plan
from edgetrain.planning.probe import Probe
from edgetrain.planning.schedule import Cut
from edgetrain.planning.workload import Workload
from edgetrain.stream.tiles import ranges_of
from edgetrain.units import ceil_gb, ceil_mb, show_mb, stated_mb

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
    cut: Cut | None = None,
    outside: int = 0,
    probe: Probe | None = None,
) -> Plan:
    """The plan of a run; it may say that the run does not fit.

    Args:
        work: the run.
        budget: bytes that PyTorch's allocator may reserve on the device, or ``None`` for no limit.
        placement: ``auto``, ``stream`` or ``resident``.
        micro_batch: asked for by the user, for all or each; ``None``: the largest that fits.
        tiles: of cells, asked for by the user; ``None``: one if that fits.
        host_budget: host bytes, or ``None``.
        disk_budget: disk bytes, or ``None``.
        cut: of the latents, as a run was begun; ``None``: whatever fits the disk.
        outside: bytes that the stated budget holds besides ``budget``.
        probe: measures a cell of each kind on the device; ``None``: the dry run alone predicts.

    Raises:
        InputError: micro-batches or tiles were asked for where they cannot be, or the last batch is a single row
            from which a cell cannot learn.
    """

    def attempt(size: int, cut: Cut | None = None, probe: Probe | None = None) -> Plan:
        return _attempt(replace(work, batch_size=size), budget, placement, micro_batch, tiles, host_budget,
                        disk_budget, cut, outside, probe)  # fmt: skip

    size = min(work.batch_size, work.rows)
    last_row = _LastRow(work)
    if (refusal := last_row.refusal(size)) is not None:
        other = next((each for each in last_row.others(size) if _fits_all(attempt(each))), None)
        advice = "no other batch size fits" if other is None else f"state --batch-size {other}"
        raise InputError(
            f"--batch-size {work.batch_size} leaves a last batch of one of the {work.rows} rows, from which"
            f" {refusal}; {advice}"
        )
    plan = attempt(work.batch_size, cut, probe)
    if plan.fits or plan.splits:
        return plan
    return replace(plan, whole_batch=next((each for each in last_row.smaller(size) if _fits_all(attempt(each))), None))


def _attempt(
    work: Workload,
    budget: int | None,
    placement: str,
    micro_batch: int | list[int] | None,
    tiles: int | list[int] | None,
    host_budget: int | None,
    disk_budget: int | None,
    cut: Cut | None,
    outside: int,
    probe: Probe | None,
) -> Plan:
    """The plan of a run of this batch size; see ``make_plan``."""
    chooser = _Chooser(work, budget, _asked(work, micro_batch), _asked_tiles(work, tiles), probe)
    cells = tuple(chooser.cell(index) for index in range(work.depth))
    if work.streams_layers and len({cell.micro_batch for cell in cells}) > 1:  # they share their micro-batches
        shared = [min(cell.micro_batch for cell in cells)] * work.depth
        chooser = _Chooser(work, budget, shared, _asked_tiles(work, tiles), probe)
        cells = tuple(chooser.cell(index) for index in range(work.depth))
    classifier, classifier_resident = chooser.classifier(lean=placement == "stream")
    visits = cells if classifier is None else (*cells, classifier)
    peak = max(cell.peak for cell in visits)
    chosen: Literal["stream", "resident"] = "stream"
    tiled = any(cell.tiles > 1 for cell in cells)
    if placement == "resident" and tiled:
        raise InputError("--placement resident: cells in tiles come from the host; leave one of the two out")
    if placement == "resident" or (
        placement == "auto"
        and work.device.type == "cuda"
        and work.depth <= _RESIDENT_CELLS
        and not (tiled or work.streams_layers or work.evaluate_every)  # evaluations want the device free
    ):
        whole, peaks = resident_peak(work, [cell.micro_batch for cell in visits])
        whole, peaks = whole + chooser.scratch, [each + chooser.scratch for each in peaks]
        if placement == "resident" or budget is None or whole <= budget:
            chosen, peak, classifier_resident = "resident", whole, True
            cells = tuple(replace(cell, peak=peaks[index], seed=0) for index, cell in enumerate(cells))
            classifier = None if classifier is None else replace(classifier, peak=peaks[-1], seed=0)
    params = [cell.params for cell in visits]
    host = storage.host_need(work, params, placement == "stream", host_budget)
    cut = cut or storage.cut_for(work, sum(params), chosen, disk_budget)
    if work.patience is not None and cut.cached is not None:
        raise InputError(
            "--patience needs the latents of all cells on disk, which --max-disk-gb does not allow; raise it, leave"
            " --patience out, or use --schedule sequence"
        )
    return Plan(
        cells=cells,
        classifier=classifier,
        placement=chosen,
        classifier_resident=classifier_resident,
        budget=budget,
        least=chooser.least if chosen == "stream" else lambda: peak,
        predicted_peak=peak,
        host_bytes=host.bytes,
        host_budget=host_budget,
        disk_bytes=storage.disk_bytes(work, sum(params), chosen, cut, disk_budget) + host.on_disk,
        disk_budget=disk_budget,
        written_bytes=storage.written_bytes(work, sum(params), chosen, cut) + host.written,
        cut=cut,
        least_disk=storage.least_disk_bytes(work, sum(params), chosen),
        batch_size=min(work.batch_size, work.rows),
        remarks=work.objective.remarks(work.nodes),
        splits=not any(work.couples_batch(index) for index in range(work.depth)),
        outside=outside,
        spills_batch=host.on_disk > 0,
    )


def require_fit(plan: Plan) -> None:
    """Refuse a plan that does not fit.

    Raises:
        BudgetError: names the limit, what was asked, and the smallest that would do.
        InputError: only the batch is too large, and it cannot be split.
    """
    if plan.whole_batch is not None:
        raise InputError(
            f"--batch-size is too large for --max-gpu-mb {stated_mb(plan.stated_budget or 0)}, and the samples of a"
            f" batch influence each other here, so that it cannot be split: state --batch-size {plan.whole_batch}"
        )
    if not plan.fits and plan.stated_budget is not None:
        worst = max(plan.visits, key=lambda cell: cell.peak)
        raise BudgetError(
            f"--max-gpu-mb {stated_mb(plan.stated_budget)} cannot hold {worst.name!r}, which needs"
            f" {show_mb(worst.peak)}{plan.beside} at micro-batch {worst.micro_batch}{_in_tiles(worst)}; the smallest"
            " budget for this run is"
            f" {ceil_mb(plan.min_budget):.2f} MiB{'' if plan.splits else ', and no smaller --batch-size fits'}"
        )
    if not plan.host_fits:
        raise BudgetError(
            f"--max-host-mb {stated_mb(plan.host_budget or 0)} is too little for batches and two cells in transit,"
            f" which need {ceil_mb(plan.host_bytes):.2f} MiB; raise it or take a smaller --batch-size"
        )
    if not plan.disk_fits:
        raise BudgetError(
            f"--max-disk-gb {(plan.disk_budget or 0) / (1 << 30):.6g} cannot hold the run folder:"
            f" {ceil_gb(plan.disk_bytes)} GiB, at least {ceil_gb(plan.least_disk)} GiB; raise it or use"
            " --latent-dtype uint8"
        )


def _in_tiles(cell: CellPlan) -> str:
    if cell.tiles > 1:
        return f" in {cell.tiles} tiles"
    return "" if cell.tileable else " (it cannot be trained in tiles)"


def _fits_all(plan: Plan) -> bool:
    return plan.fits and plan.host_fits and plan.disk_fits


class _LastRow:
    """Which batch sizes leave a last batch of a single row, and whether the cells can learn from it."""

    def __init__(self, work: Workload):
        self._work = work

    def refusal(self, size: int) -> str | None:
        """The cell that cannot learn from the last batch, and why; ``None``: all can."""
        if (self._work.rows - 1) % size:
            return None
        return self._of_one_row

    def smaller(self, size: int) -> Iterator[int]:
        """Smaller batches, about half as large each time, from whose last batch the cells can learn."""
        while size > 1:
            size //= 2
            while size and self.refusal(size) is not None:
                size -= 1
            if size:
                yield size

    def others(self, size: int) -> Iterator[int]:
        """Batches to state instead, the nearest smaller one first."""
        below = (each for each in range(size - 1, 0, -1) if self.refusal(each) is None)
        yield from islice(below, 1)
        yield from self.smaller(size)
        above = (each for each in range(size + 1, self._work.rows + 1) if self.refusal(each) is None)
        yield from islice(above, 1)

    @cached_property
    def _of_one_row(self) -> str | None:
        kinds = set()
        for node in self._work.nodes:
            kind = node.recipe.signature, node.parent.shape
            if kind not in kinds and (why := refusal_of_one_row(self._work, node.index)) is not None:
                return f"cell {node.index + 1} ({node.recipe.name}) cannot learn: {why}"
            kinds.add(kind)
        return None


def backprop_peak(work: Workload, net: Net) -> int | None:
    """Peak device bytes of plain backpropagation on the same net, batch and optimizer.

    A long row of equal cells adds the same with every cell, so its peak is found from short rows. ``None`` where
    backpropagation fails on the net, such as after an in-place operation: a comparison must not end a run.
    """
    try:
        return _backprop_peak(work, net)
    except RuntimeError:
        return None


def _backprop_peak(work: Workload, net: Net) -> int:
    runs = [list(group) for _, group in groupby(net.cells, key=lambda recipe: recipe.signature)]
    short = [run[: _REPEATS[0]] for run in runs]
    base = _backprop(work, replace(net, cells=[recipe for run in short for recipe in run]))
    total = base
    for number, run in enumerate(runs):
        if len(run) > _REPEATS[0]:
            longer = [*short[:number], run[: _REPEATS[1]], *short[number + 1 :]]
            step = _backprop(work, replace(net, cells=[recipe for part in longer for recipe in part])) - base
            total += step * (len(run) - _REPEATS[0])
    return total


def backprop_work(work: Workload, net: Net) -> Workload:
    """Plain backpropagation on the same data, net, batch and optimizer."""
    channels_last = any(node.channels_last for node in work.nodes)
    whole = nodes([joined(list(net.cells))], net.in_shape, work.seed, net.output, channels_last)
    return replace(
        work,
        nodes=tuple(whole),
        inputs=replace(work.inputs, shape=net.in_shape),  # a method may give the net more than the data have
        objective=Backpropagation(work.classes, net.options),
        classifier=None,
        classifier_epochs=0,
    )


def _backprop(work: Workload, net: Net) -> int:
    return cell_peak(backprop_work(work, net), 0, work.batch_size).bytes


def _asked(work: Workload, micro_batch: int | list[int] | None) -> list[int] | None:
    if micro_batch is None:
        return None
    visits = work.depth + (work.classifier is not None)
    asked = [micro_batch] * visits if isinstance(micro_batch, int) else micro_batch
    if len(asked) != visits:
        raise InputError(f"micro_batch lists {len(asked)} numbers; expected {visits}, one for each cell")
    size = min(work.batch_size, work.rows)
    for index in range(work.depth):
        if asked[index] < size and work.couples_batch(index):
            raise InputError(
                f"--micro-batch {asked[index]}: the samples of a batch influence each other in cell {index + 1}"
                "; it takes batches whole"
            )
    return [min(each, size) for each in asked]


def _asked_tiles(work: Workload, tiles: int | list[int] | None) -> list[int] | None:
    if tiles is None:
        return None
    asked = tiles if isinstance(tiles, list) else [tiles] * work.depth
    if len(asked) not in (work.depth, work.depth + (work.classifier is not None)):
        raise InputError(f"tiles lists {len(asked)} numbers; expected {work.depth}, one for each cell")
    for node, each in zip(work.nodes, asked, strict=False):
        if each > 1 and work.optimizer.clip_norm is not None:
            raise InputError("--clip-norm needs the gradients of a whole cell, and --tiles trains it in parts: use one")
        if each > 1 and not work.tileable(node):
            raise InputError(
                f"--tiles {each}: cell {node.index + 1} cannot be trained in tiles by {work.objective.name}; they are"
                " for dense cells without dropout and batch normalisation, by rules that see a cell through a small sum"
                " over its units (docs/budget.md)"
            )
    most = max(prod(node.shape) for node in work.nodes)
    if max(asked[: work.depth]) > most:
        raise InputError(
            f"--tiles {max(asked[: work.depth])}: the widest cell has {most} units; expected at most as many"
        )
    return asked


@dataclass(frozen=True)
class _Choice:
    """How a kind of cell is trained."""

    params: int
    micro: int
    tiles: int
    peak: Peak
    scratch: int = 0


class _Chooser:
    """Finds for each node the largest micro-batch that fits, looking at each kind of cell once.

    A cell that does not fit in any micro-batch is cut into tiles: as few as allow the largest micro-batch.
    """

    def __init__(
        self,
        work: Workload,
        budget: int | None,
        asked: list[int] | None,
        tiles: list[int] | None,
        probe: Probe | None = None,
    ):
        self._work, self._budget, self._asked, self._tiles, self._probe = work, budget, asked, tiles, probe
        self._scratch: dict[tuple[int, int, int], int] = {}  # bytes by node, micro-batch and tiles; see ``Probe``
        self._known: dict[Hashable, _Choice] = {}
        self._nodes: dict[Hashable, int] = {}  # one of each kind
        self._peaks: dict[tuple[int, int, int, bool], Peak] = {}  # by node, micro-batch, tiles and residency

    def cell(self, index: int) -> CellPlan:
        """The plan of a cell."""
        work, node = self._work, self._work.nodes[index]
        kind = (
            work.kind(index),
            self._asked and self._asked[index],
            self._tiles and self._tiles[index],
        )
        if kind not in self._known:
            self._nodes[kind] = index
            self._known[kind] = self._choose_and_probe(index)
        found = self._known[kind]
        latents, tileable = storage.latent_bytes(work, index), work.tileable(node)
        return CellPlan(
            node.recipe.name, found.params, found.micro, found.peak.bytes, latents, found.tiles, tileable,
            found.peak.seed, found.peak.evaluation_seed,
        )  # fmt: skip

    @property
    def scratch(self) -> int:
        """The most bytes that kernels were found to take in the chosen cells beyond the dry run's."""
        return max((choice.scratch for choice in self._known.values()), default=0)

    def least(self) -> int:
        """The smallest budget that would do, all cells streamed."""
        peaks = [self._leanest(index) + self._known[kind].scratch for kind, index in self._nodes.items()]
        if self._work.classifier is not None:
            peaks.append(min(self._bytes(self._work.depth, size, 1) for size in _ends(self._sizes(self._work.depth))))
        return max(peaks)

    def _leanest(self, index: int) -> int:
        sizes = _ends(self._sizes(index))
        return min(self._dry_peak(index, size, tiles).bytes for tiles in self._extremes(index) for size in sizes)

    def classifier(self, lean: bool) -> tuple[CellPlan | None, bool]:
        """The plan of the trained classifier, and whether it stays on the device as a whole."""
        work = self._work
        if work.classifier is None:
            return None, False
        sizes = self._sizes(work.depth)
        params = work.classes * (sum(work.feature_widths) + 1)
        micro, peak, resident = 0, 0, not lean
        if resident:
            micro, peak = self._largest(sizes, partial(self._bytes, work.depth, tiles=1, resident=True))
            resident = self.fits(peak)
        if not resident:
            micro, peak = self._largest(sizes, partial(self._bytes, work.depth, tiles=1))
        seed = self._peak(work.depth, micro, 1, resident).seed
        return CellPlan("classifier", params, micro, peak, 0, seed=seed), resident

    def fits(self, peak: int) -> bool:
        """Whether the budget holds it."""
        return self._budget is None or peak <= self._budget

    def _choose_and_probe(self, index: int) -> _Choice:
        """The choice by the dry run; if more is reserved on the device and that does not fit, the next choice."""
        while True:
            found = self._choose(index)
            key = index, found.micro, found.tiles
            if self._probe is None or key in self._scratch or not self.fits(found.peak.bytes):
                return replace(found, scratch=self._scratch.get(key, 0))
            self._scratch[key] = self._probe.scratch_bytes(self._work, *key, found.peak)

    def _choose(self, index: int) -> _Choice:
        work, node = self._work, self._work.nodes[index]
        with torch.device("meta"):
            head = work.objective.head(node)
        params = node.recipe.parameters() + (0 if head is None else sum(value.numel() for value in head.parameters()))
        fewest, most = self._extremes(index)
        better, tiles, leanest = self._sizes(index), fewest, None
        chosen: _Choice | None = None
        while better:
            micro, peak = self._largest(better, partial(self._bytes, index, tiles=tiles))
            found = _Choice(params, micro, tiles, self._peak(index, micro, tiles))
            if self.fits(peak):
                chosen, better = found, [size for size in better if size > micro]
            elif leanest is None or peak < leanest.peak.bytes:
                leanest = found
            if tiles == most or (tiles == 1 and chosen):
                break
            tiles = len(ranges_of(prod(node.shape), min(2 * tiles, most)))
        result = chosen or leanest
        assert result is not None
        return result

    def _extremes(self, index: int) -> tuple[int, int]:
        """The fewest and the most tiles that a cell may be cut into."""
        node = self._work.nodes[index]
        units = prod(node.shape)
        if self._tiles is not None:
            asked = len(ranges_of(units, self._tiles[index]))
            return asked, asked
        return 1, len(ranges_of(units, units)) if self._work.tileable(node) else 1

    def _bytes(self, index: int, size: int, tiles: int, resident: bool = False) -> int:
        return self._peak(index, size, tiles, resident).bytes

    def _peak(self, index: int, size: int, tiles: int, resident: bool = False) -> Peak:
        found, scratch = self._dry_peak(index, size, tiles, resident), self._scratch.get((index, size, tiles), 0)
        return replace(found, bytes=found.bytes + scratch) if scratch else found

    def _dry_peak(self, index: int, size: int, tiles: int, resident: bool = False) -> Peak:
        key = index, size, tiles, resident
        if key not in self._peaks:
            self._peaks[key] = cell_peak(self._work, *key)
        return self._peaks[key]

    def _sizes(self, index: int) -> list[int]:
        """Micro-batches to try, largest first."""
        size = min(self._work.batch_size, self._work.rows)
        if self._asked is not None:
            return [self._asked[index]]
        if index < self._work.depth and self._work.couples_batch(index):
            return [size]
        halves = [size]
        while halves[-1] > 1:
            halves.append(-(-halves[-1] // 2))
        return halves

    def _largest(self, sizes: list[int], peak_at: Callable[[int], int]) -> tuple[int, int]:
        """The first size that fits (or the leanest), and its peak.

        Splitting a batch first costs memory, because gradients are summed up beside the new ones; from
        there on smaller is leaner. So the least peak is that of the whole batch or of the smallest part.
        """
        if self.fits(peak_at(sizes[0])):
            return sizes[0], peak_at(sizes[0])
        leanest = min(_ends(sizes), key=lambda size: (peak_at(size), -size))
        if not self.fits(peak_at(leanest)):
            return leanest, peak_at(leanest)
        chosen, between = sizes[-1], sizes[1:-1]
        while between:
            middle = len(between) // 2
            if self.fits(peak_at(between[middle])):
                chosen, between = between[middle], between[:middle]
            else:
                between = between[middle + 1 :]
        return chosen, peak_at(chosen)


def _ends(sizes: list[int]) -> list[int]:
    return sizes if len(sizes) == 1 else [sizes[0], sizes[-1]]
