"""The executor's own steps over fake tensors: what the device side will hold, found in milliseconds.

No memory is taken and no GPU is needed. On CUDA the sequence of allocations is replayed through a
model of PyTorch's caching allocator, because the budget is about what that reserves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from edgetrain.memory.allocator import CachingAllocatorModel
from edgetrain.memory.meter import Listener, LiveBytes, LiveMeter
from edgetrain.memory.timeline import Timeline, making
from edgetrain.planning.workload import Workload
from edgetrain.store.rows import RowFormat
from edgetrain.stream.cell import LiveCell, shapes_of
from edgetrain.stream.executor import Executor, Tally
from edgetrain.stream.feed import LABELS, DeviceFeed, HostBatch, Part, Slice, Transfer, slots_on
from edgetrain.stream.latents import DeviceLatents
from edgetrain.stream.readout import DeviceCellsFeed, Portion, Reading, Readout, Slots, train_readout
from edgetrain.stream.tiles import TiledCell, at_hand, phases_of

_CPU = torch.device("cpu")
_STEPS = 2  # the first makes the optimizer's state, the second is steady
# Kernels' own scratch that the dry run cannot see: cuBLAS and cuBLASLt workspaces as configured.
CUDA_WORKSPACE_BYTES = 2 << 20


@dataclass
class Bench:
    """Fake tensors, with a meter and a timeline of the device side and, for CUDA, the allocator's model."""

    tracker: LiveBytes
    meter: LiveMeter
    timeline: Timeline
    allocator: CachingAllocatorModel | None

    @property
    def peak(self) -> int:
        """Bytes that the device must give: reserved on CUDA, live elsewhere."""
        if self.allocator is None:
            return self.tracker.peak
        return self.allocator.peak_reserved_bytes + CUDA_WORKSPACE_BYTES


@contextmanager
def bench(device: torch.device, needs_values: bool = False) -> Iterator[Bench]:
    """A scope in which tensors are metered as if they were on ``device``; they are fake unless a cell needs values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    allocator = CachingAllocatorModel() if device.type == "cuda" else None
    timeline = Timeline()
    listeners: list[Listener] = [timeline] if allocator is None else [allocator, timeline]
    tracker = LiveBytes(*listeners)
    with nullcontext() if needs_values else FakeTensorMode(allow_non_fake_inputs=True):
        yield Bench(tracker, LiveMeter(full=True, tracker=tracker), timeline, allocator)


class _NoSink:
    """Latents that leave the device take no room there."""

    def put(self, first: int, streams: object) -> None:
        """Nothing to keep."""

    def close(self) -> None:
        """Nothing to wait for."""


class _FakeFeed:
    """A file feed whose host batches hold no values."""

    waited_s = 0.0

    def __init__(self, inputs: dict[str, RowFormat], meter: LiveMeter, slots: int):
        self._formats, self._meter, self._slots = {**inputs, "y": LABELS}, meter, slots

    def parts(self, work: Slice) -> Iterator[Part]:
        """See ``stream.feed.Feed``."""
        with self._meter.host():
            buffers = {
                stream: torch.zeros(work.batch_size, layout.row_bytes, dtype=torch.uint8)
                for stream, layout in self._formats.items()
            }
        batches = (HostBatch(step, start, stop - start, buffers) for step, start, stop in work.steps())
        transfer = Transfer(self._formats, _CPU, work.micro_batch, self._slots)
        yield from transfer.parts(work, batches, lambda batch: None)


def cell_peak(work: Workload, index: int, micro_batch: int, tiles: int = 1) -> int:
    """Peak bytes of a visit to cell ``index``, streamed: its steps, emitting after them, and evaluation."""
    peak = visited(work, index, micro_batch, tiles).peak
    if len(work.objective.unlabelled_names) > 1:  # otherwise evaluation takes a part of what training takes
        peak = max(peak, _evaluation_peak(work, index, micro_batch, tiles))
    return peak


def visited(work: Workload, index: int, micro_batch: int, tiles: int = 1) -> Bench:
    """The bench after a visit to cell ``index``, streamed: its first steps, and emitting after them."""
    with bench(work.device, work.needs_values(index)) as table:
        cell = place(work, index, table, tiles)
        feed = _FakeFeed(work.formats_into(index), table.meter, slots_on(work.device))
        _run(work, index, micro_batch, table, cell, feed, _NoSink())
    return table


def _evaluation_peak(work: Workload, index: int, micro_batch: int, tiles: int) -> int:
    """Peak bytes of looking for the classes with cell ``index``, as the predictor does."""
    with bench(work.device, work.needs_values(index)) as table:
        cell = place(work, index, table, tiles)
        names = ("x",) if index == 0 else work.objective.unlabelled_names
        formats = dict.fromkeys(names, work.inputs if index == 0 else RowFormat(work.nodes[index - 1].shape))
        feed = _FakeFeed(formats, table.meter, slots_on(work.device))
        executor = Executor(work.objective, _CPU, table.meter, work.seed)
        size = work.objective.evaluation_batch(micro_batch)
        piece = Slice(_STEPS * size, size, size, 0, _STEPS, phases=cell.tiles)
        executor.read(cell, feed, piece, _NoSink(), lambda part, scores, latents: None)
        return table.peak


def refusal_of_one_row(work: Workload, index: int) -> str | None:
    """Why cell ``index`` cannot take a training step on a batch of one row; ``None``: it can.

    Batch normalisation has no variance of a single value for each channel.
    """
    try:
        visited(replace(work, batch_size=1), index, 1)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0]
    return None


def place(work: Workload, index: int, table: Bench, tiles: int = 1) -> LiveCell | TiledCell:
    """The cell on the bench: without values on fake tensors, with its first weights where it needs values."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    node, host, shapes = work.nodes[index], table.meter.host, None
    if not work.needs_values(index):
        with unset_fake_temporarily():  # modules with buffers cannot be made on two pretended devices at once
            shapes = shapes_of(node, work.objective)
    with table.meter.watch():
        return at_hand(node, work.objective, work.optimizer, _CPU, tiles, host=host, shapes=shapes)


def _run(
    work: Workload,
    index: int,
    micro_batch: int,
    table: Bench,
    cell: LiveCell | TiledCell,
    feed: _FakeFeed | DeviceFeed,
    sink: _NoSink | DeviceLatents,
) -> None:
    executor = Executor(work.objective, _CPU, table.meter, work.seed, work.augmentation)
    piece = _slice(work, micro_batch, phases_of(work.objective, cell.tiles))
    emitting = sink if work.hands_on(index) else None
    with table.meter.watch():
        tally = Tally(_CPU)
    executor.train(cell, feed, piece, 0, tally, emitting if work.emits_in_training else None)
    del tally
    if not work.emits_in_training:
        executor.emit(cell, feed, _slice(work, micro_batch, cell.tiles, shuffled=False), emitting)


@dataclass(frozen=True)
class _Excerpt(Slice):
    """Steps whose many equal micro-batches are not all run: the second already sums up gradients.

    All are full batches of the same rows, as many as there are for certain.
    """

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """See ``Slice``."""
        for step, _, _ in super().steps():
            yield step, 0, self.batch_size

    def parts(self, size: int) -> Iterator[tuple[int, int, int, bool]]:
        """The first and the last part of each phase, and the second if the last is smaller."""
        for _, parts in groupby(super().parts(size), key=itemgetter(0)):
            listed = list(parts)
            smaller = size % self.micro_batch > 0
            yield from listed if len(listed) <= 2 else [*listed[: 1 + smaller], listed[-1]]


def stepping(
    work: Workload, index: int, micro_batch: int, table: Bench, cell: LiveCell | TiledCell, steps: int
) -> None:
    """Some training steps of cell ``index`` with all their micro-batches, latents going to no file."""
    feed = _FakeFeed(work.formats_into(index), table.meter, slots_on(work.device))
    executor = Executor(work.objective, _CPU, table.meter, work.seed, work.augmentation)
    piece = _whole_steps(work, micro_batch, phases_of(work.objective, cell.tiles), steps)
    sink = _NoSink() if work.hands_on(index) and work.emits_in_training else None
    executor.train(cell, feed, piece, 0, Tally(_CPU), sink)


def emitting(
    work: Workload, index: int, micro_batch: int, table: Bench, cell: LiveCell | TiledCell, steps: int
) -> None:
    """Some batches of the finished cell ``index``, latents going to no file."""
    feed = _FakeFeed(work.formats_into(index), table.meter, slots_on(work.device))
    executor = Executor(work.objective, _CPU, table.meter, work.seed, work.augmentation)
    executor.emit(cell, feed, _whole_steps(work, micro_batch, cell.tiles, steps), _NoSink())


def stepping_readout(work: Workload, micro_batch: int, table: Bench, resident: bool, steps: int) -> None:
    """Some training steps of the classifier."""
    feed = _FakeCellsFeed([work.format_into(index + 1) for index in work.classifier_reads], _reading(work))
    piece, cells = _whole_steps(work, micro_batch, 1, steps), len(work.classifier_reads)
    train_readout(_readout(work, table, resident), feed, piece, cells, work.classes, table.meter, Tally(_CPU))


def _whole_steps(work: Workload, micro_batch: int, phases: int, steps: int) -> Slice:
    size = min(work.batch_size, work.rows)
    return Slice(steps * size, size, min(micro_batch, size), 0, steps, np.zeros(steps * size, np.int64), phases)


def _slice(work: Workload, micro_batch: int, phases: int, shuffled: bool = True) -> Slice:
    """Two steps of full batches (or of all rows, if these are fewer)."""
    size = min(work.batch_size, work.rows)
    order = np.zeros(_STEPS * size, np.int64) if shuffled else None
    return _Excerpt(_STEPS * size, size, min(micro_batch, size), 0, _STEPS, order, phases)


def readout_peak(work: Workload, micro_batch: int, resident: bool) -> int:
    """Peak bytes of a visit to the classifier, its blocks resident or streamed; latents from files."""
    return visited_readout(work, micro_batch, resident).peak


def visited_readout(work: Workload, micro_batch: int, resident: bool) -> Bench:
    """The bench after a visit to the classifier; see ``readout_peak``."""
    with bench(work.device) as table:
        readout = _readout(work, table, resident)
        formats = [work.format_into(index + 1) for index in work.classifier_reads]
        feed = _FakeCellsFeed(formats, _reading(work))
        _run_readout(work, micro_batch, table, readout, feed)
    return table


def _readout(work: Workload, table: Bench, resident: bool) -> Readout:
    assert work.readout is not None
    with table.meter.watch():
        return Readout(work.feature_widths, work.classes, work.readout, _CPU, work.seed, table.meter, resident)


def _run_readout(
    work: Workload,
    micro_batch: int,
    table: Bench,
    readout: Readout,
    feed: _FakeCellsFeed | DeviceCellsFeed,
) -> None:
    with table.meter.watch():
        tally = Tally(_CPU)
    piece = _slice(work, micro_batch, 1)
    train_readout(readout, feed, piece, len(work.classifier_reads), work.classes, table.meter, tally)


def _reading(work: Workload) -> Reading:
    return Reading(work.objective.classifier_stream, work.objective.features)


class _FakeCellsFeed:
    waited_s = 0.0

    def __init__(self, formats: list[RowFormat], reading: Reading):
        self._formats, self._reading = formats, reading

    def portions(self, work: Slice, sweeps: int) -> Iterator[Portion]:
        """See ``stream.readout.CellsFeed``."""
        slots = Slots([layout.row_bytes for layout in self._formats], work.micro_batch, _CPU)
        for _, start, stop in work.steps():
            for _ in range(sweeps):
                for layout in self._formats:
                    for _, first, last, _ in work.parts(stop - start):
                        with making("latents"):
                            z = layout.decode(slots.view(last - first, layout.row_bytes))
                            y = LABELS.decode(slots.view_labels(last - first))
                        yield self._reading.portion(first, last, z, y)
                        del z


def resident_peak(work: Workload, micro_batches: list[int]) -> tuple[int, list[int]]:
    """Peak bytes with data set, latents and cells all on the device: of the run, and by visit."""
    _, visits = visited_all(work, micro_batches)
    peaks = [max(visit.peak for visit in visits if visit.node == node) for node in range(len(micro_batches))]
    return max(peaks), peaks


@dataclass(frozen=True)
class ResidentVisit:
    """A visit with everything on the device.

    Attributes:
        node: the cell's number, or one behind the last: the classifier.
        peak: bytes.
        operation: that reached it, of live bytes.
        last: the timeline's changes when it ended.
    """

    node: int
    peak: int
    operation: str
    last: int


def visited_all(work: Workload, micro_batches: list[int]) -> tuple[Bench, list[ResidentVisit]]:
    """The bench after a run with data set, latents and cells all on the device, and its visits.

    Cells that take turns every epoch meet all others on the device from the second epoch on.
    """
    visits: list[ResidentVisit] = []

    def note(node: int) -> None:
        visits.append(ResidentVisit(node, table.peak, table.tracker.peak_operation, table.timeline.changes))

    with bench(work.device, any(map(work.needs_values, range(work.depth)))) as table:
        with table.meter.watch(), making("latents"):
            latents = {0: _resident(work.rows, work.inputs)}
            labels = torch.zeros(work.rows, dtype=torch.int64)
        kept: list[LiveCell | TiledCell] = []
        readout: Readout | None = None
        for _ in range(min(work.epochs, 2) if work.emits_in_training else 1):
            for index in range(work.depth):
                table.tracker.reset_peak()
                if index == len(kept):
                    kept.append(place(work, index, table))
                out = DeviceLatents(work.rows * work.views, work.latent_dtype, work.emits_in_training)
                _run(work, index, micro_batches[index], table, kept[index], DeviceFeed(latents[index], labels), out)
                latents[index + 1] = out
                note(index)
                if index and index - 1 not in work.classifier_reads:
                    latents.pop(index).free()  # nobody reads the cell's inputs any more
            if work.readout is not None:
                table.tracker.reset_peak()
                readout = readout or _readout(work, table, resident=True)
                read = [index + 1 for index in work.classifier_reads]
                feed = DeviceCellsFeed([latents[index] for index in read], labels, _reading(work))
                _run_readout(work, micro_batches[-1], table, readout, feed)
                note(work.depth)
                for index in read:
                    latents.pop(index).free()
        latents[0].free()
    return table, visits


def _resident(rows: int, layout: RowFormat) -> DeviceLatents:
    latents = DeviceLatents(rows, layout.dtype, False)
    latents.formats["x"] = layout
    latents.tensors["x"] = torch.zeros(rows, layout.row_bytes, dtype=torch.uint8)
    return latents
