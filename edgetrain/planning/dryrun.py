"""The executor's own steps over fake tensors: what the device side will hold, found in milliseconds.

No memory is taken and no GPU is needed. On CUDA the sequence of allocations is replayed through a
model of PyTorch's caching allocator, because the budget is about what that reserves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from edgetrain.memory import device as devices
from edgetrain.memory.allocator import CachingAllocatorModel
from edgetrain.memory.meter import Listener, LiveBytes, LiveMeter
from edgetrain.memory.timeline import Timeline, making
from edgetrain.planning.seeding import Requests
from edgetrain.planning.workload import Workload
from edgetrain.store.latents import Rows
from edgetrain.store.rows import RowFormat
from edgetrain.stream.cell import Cell, shapes_of
from edgetrain.stream.executor import Executor
from edgetrain.stream.inputs import evaluation_inputs, training_inputs
from edgetrain.stream.latents import DeviceLatents, Sink
from edgetrain.stream.outputs import Outputs, Tally
from edgetrain.stream.reader import LABELS, Reader, Source, slots_on
from edgetrain.stream.span import Span

_CPU = torch.device("cpu")
_STEPS = 2  # the first makes the optimizer's state, the second is steady


@dataclass
class Bench:
    """Fake tensors, with a meter and a timeline of the device side and, for CUDA, the allocator's model.

    Attributes:
        requests: what CUDA's allocator was asked for, in order; elsewhere ``None``.
        device: where tensors are.
    """

    tracker: LiveBytes
    meter: LiveMeter
    timeline: Timeline
    allocator: CachingAllocatorModel | None
    requests: Requests | None
    device: torch.device = _CPU

    @property
    def peak(self) -> int:
        """Bytes that the device must give: reserved on CUDA, live elsewhere."""
        if self.allocator is None:
            return self.tracker.peak
        return self.allocator.peak_reserved_bytes

    @cached_property
    def seeded(self) -> Peak:
        """Likewise, if the best block is taken and given back before the first tensor."""
        if self.requests is None:
            return Peak(self.tracker.peak)
        seed, reserved = self.requests.best_seed()
        return Peak(reserved, seed)


@dataclass(frozen=True)
class Peak:
    """Device bytes of a visit.

    Attributes:
        bytes: at most, in training and where classes are looked for.
        seed: bytes of a block that is taken and given back before training; see ``planning.seeding``.
        evaluation_seed: likewise, before classes are looked for.
    """

    bytes: int
    seed: int = 0
    evaluation_seed: int = 0


@contextmanager
def bench(device: torch.device, needs_values: bool = False) -> Iterator[Bench]:
    """A scope in which tensors are metered as if they were on ``device``; they are fake unless a cell needs values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    allocator = requests = None
    if device.type == "cuda":
        allocator, requests = CachingAllocatorModel(), Requests(devices.workspace_requests())
        for key, size in enumerate(requests.held, 1):
            allocator.alloc(-key, size)
    timeline = Timeline()
    listeners: list[Listener] = [each for each in (allocator, requests, timeline) if each is not None]
    tracker = LiveBytes(*listeners)
    with nullcontext() if needs_values else FakeTensorMode(allow_non_fake_inputs=True):
        yield Bench(tracker, LiveMeter(full=True, tracker=tracker), timeline, allocator, requests)


@dataclass(frozen=True)
class _NoRows:
    """A source of rows without values; implements ``stream.reader.Source``."""

    formats: Mapping[str, RowFormat]
    step_order: bool = False
    on_device: bool = False

    def begin(self) -> None:
        """There is nothing to do."""

    def gather(self, rows: Rows, out: Mapping[str, Tensor]) -> None:
        """Zeros, where the cell needs values at all."""
        for values in out.values():
            values.zero_()


@dataclass(frozen=True)
class _NoFile:
    """A sink of latents that leave the device; they are encoded there."""

    dtype: str

    def put(self, first: int, streams: Mapping[str, Tensor]) -> None:
        """Encode them and keep nothing."""
        for values in streams.values():
            with making("latents"):
                RowFormat(tuple(values.shape[1:]), self.dtype).encode(values)

    def close(self) -> None:
        """There is nothing to wait for."""


_LABELS = _NoRows({"y": LABELS})


def cell_peak(work: Workload, index: int, micro_batch: int, tiles: int = 1, resident: bool = False) -> Peak:
    """Peak of a visit to node ``index``, streamed: its steps, emitting after them, and evaluation.

    Args:
        work: the run.
        index: of the cell, or the number of cells for the classifier.
        micro_batch: samples on the device at once.
        tiles: of the cell.
        resident: whether all of the classifier stays on the device during its visit.
    """
    training = visited(work, index, micro_batch, tiles, resident).seeded
    several = len(work.objective.unlabelled_names) > 1
    if index == work.depth or not (several or work.device.type == "cuda"):  # no more lives than in training
        return training
    evaluation = _evaluated(work, index, micro_batch, tiles).seeded
    return Peak(max(training.bytes, evaluation.bytes), training.seed, evaluation.seed)


def visited(work: Workload, index: int, micro_batch: int, tiles: int = 1, resident: bool = False) -> Bench:
    """The bench after a visit to node ``index``, streamed; see ``cell_peak``."""
    with bench(work.device, work.needs_values(index)) as table:
        visit(work, index, micro_batch, table, tiles, resident)
    return table


def visit(work: Workload, index: int, micro_batch: int, table: Bench, tiles: int = 1, resident: bool = False) -> None:
    """Train node ``index`` for a few steps, streamed, and let it emit."""
    cell = place(work, index, table, tiles, resident)
    _visit(work, index, micro_batch, table, cell, _reader(work, index, table), _NoFile(work.latent_dtype))


def _evaluated(work: Workload, index: int, micro_batch: int, tiles: int) -> Bench:
    """The bench after looking for the classes with cell ``index``, as the predictor does."""
    with bench(work.device, work.needs_values(index)) as table:
        evaluate(work, index, micro_batch, table, tiles)
    return table


def evaluate(work: Workload, index: int, micro_batch: int, table: Bench, tiles: int = 1) -> None:
    """Look for the classes of a few batches with cell ``index``, as the predictor does."""
    cell = place(work, index, table, tiles)
    names = ("x",) if index == 0 else work.objective.unlabelled_names
    formats = dict.fromkeys(names, work.inputs if index == 0 else RowFormat(work.nodes[index - 1].shape))
    prepare = evaluation_inputs(work.objective) if index == 0 else None
    reader = Reader([_NoRows(formats)], _LABELS, table.device, table.meter.host, 0, prepare, slots_on(work.device))
    size = work.objective.evaluation_batch(micro_batch)
    span = Span(_STEPS * size, size, size, 0, _STEPS)
    Executor(table.meter, work.seed).run("evaluate", cell, reader, span, Outputs(sink=_NoFile("float32")))


def evaluation_seeds(work: Workload, micro_batches: list[int], tiles: list[int]) -> list[int]:
    """Bytes of the block to take and give back before classes are looked for with each cell."""
    known: dict[object, int] = {}
    found = []
    for node, micro_batch, each in zip(work.nodes, micro_batches, tiles, strict=False):
        kind = node.recipe.signature, node.parent.shape, node.index == 0, micro_batch, each
        if kind not in known:
            known[kind] = _evaluated(work, node.index, micro_batch, each).seeded.seed
        found.append(known[kind])
    return found


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


def place(work: Workload, index: int, table: Bench, tiles: int = 1, resident: bool = False) -> Cell:
    """The cell on the bench: without values on fake tensors, with its first weights where it needs values."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    shapes = None
    if index < work.depth and not work.needs_values(index) and table.device == _CPU:
        with unset_fake_temporarily():  # modules with buffers cannot be made on two pretended devices at once
            shapes = shapes_of(work.nodes[index], work.objective)
    with table.meter.watch():
        return work.builder(table.device, table.meter.host, resident).build(index, tiles, shapes=shapes)


def _reader(work: Workload, index: int, table: Bench, sources: list[Source] | None = None) -> Reader:
    """A reader of what node ``index`` reads, from files unless ``sources`` are given."""
    streams = work.streams_of(index)
    in_files = [
        _NoRows({name: work.formats_into(number)[name] for name in streams}) for number in work.sources_of(index)
    ]
    prepare = training_inputs(work.objective, work.augmentation) if work.reads_inputs(index) else None
    slots = slots_on(work.device) if sources is None else 1
    labels = _LABELS if sources is None else sources.pop()
    return Reader(sources or in_files, labels, table.device, table.meter.host, 0, prepare, slots)


def _visit(work: Workload, index: int, micro_batch: int, table: Bench, cell: Cell, reader: Reader, sink: Sink) -> None:
    executor = Executor(table.meter, work.seed)
    emits = index < work.depth and work.emits(index)
    with table.meter.watch():
        tally = Tally(table.device)
    while_training = sink if emits and work.emits_in_training else None
    executor.train(cell, reader, _excerpt(work, micro_batch), Outputs(tally, while_training))
    del tally
    if emits and not work.emits_in_training:
        executor.run("emit", cell, reader, _excerpt(work, micro_batch, shuffled=False), Outputs(sink=sink))


@dataclass(frozen=True)
class _Excerpt(Span):
    """Steps of which only those micro-batches are run that can differ: the second already sums up gradients.

    Attributes:
        sizes: samples of each step.
    """

    sizes: tuple[int, ...] = field(default=())

    def bounds(self, step: int) -> tuple[int, int]:
        """See ``Span``; all steps are of the same rows."""
        return 0, self.sizes[step]

    def micro_batches(self, size: int) -> list[tuple[int, int]]:
        """The first and the last micro-batch, and the second if the last is smaller."""
        whole = super().micro_batches(size)
        smaller = size % self.micro_batch > 0
        return whole if len(whole) <= 2 else [*whole[: 1 + smaller], whole[-1]]


def _excerpt(work: Workload, micro_batch: int, shuffled: bool = True) -> _Excerpt:
    """Two steps of full batches (or of all rows, if these are fewer).

    A short last batch takes no more, but on CUDA it moves tensors between the allocator's pools of large and small
    blocks, so that it is run there too, and a full batch after it.
    """
    size = min(work.batch_size, work.rows)
    sizes: tuple[int, ...] = (size,) * _STEPS
    if work.device.type == "cuda" and (short := work.rows % size):
        sizes = (*sizes, short, size) if shuffled else (*sizes, short)
    order = np.zeros(size, np.int64) if shuffled else None
    return _Excerpt(work.rows, size, min(micro_batch, size), 0, len(sizes), order, sizes=sizes)


def stepping(work: Workload, index: int, micro_batch: int, table: Bench, cell: Cell, steps: int) -> None:
    """Some training steps of node ``index`` with all their micro-batches, latents going to no file."""
    emits = index < work.depth and work.emits(index) and work.emits_in_training
    out = Outputs(Tally(_CPU), _NoFile(work.latent_dtype) if emits else None)
    span = _whole_steps(work, micro_batch, steps)
    Executor(table.meter, work.seed).train(cell, _reader(work, index, table), span, out)


def emitting(work: Workload, index: int, micro_batch: int, table: Bench, cell: Cell, steps: int) -> None:
    """Some batches of the finished cell ``index``, latents going to no file."""
    out, span = Outputs(sink=_NoFile(work.latent_dtype)), _whole_steps(work, micro_batch, steps)
    Executor(table.meter, work.seed).run("emit", cell, _reader(work, index, table), span, out)


def _whole_steps(work: Workload, micro_batch: int, steps: int) -> Span:
    size = min(work.batch_size, work.rows)
    return Span(steps * size, size, min(micro_batch, size), 0, steps, np.zeros(steps * size, np.int64))


def resident_peak(work: Workload, micro_batches: list[int]) -> tuple[int, list[int]]:
    """Peak bytes with data set, latents and cells all on the device: of the run, and by visit."""
    _, visits = visited_all(work, micro_batches)
    peaks = [max(visit.peak for visit in visits if visit.node == node) for node in range(len(micro_batches))]
    return max(peaks), peaks


@dataclass(frozen=True)
class ResidentVisit:
    """A visit with everything on the device.

    Attributes:
        node: the cell's number, or the number of cells for the classifier.
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
    with bench(work.device, any(map(work.needs_values, range(work.depth)))) as table:
        whole = _AllResident(work, micro_batches, table)
        for _ in range(min(work.epochs, 2) if work.emits_in_training else 1):
            for index in range(work.depth + (work.classifier is not None)):
                whole.visit(index)
    return table, whole.visits


class _AllResident:
    """A run on the bench with everything on the device."""

    def __init__(self, work: Workload, micro_batches: list[int], table: Bench):
        self.visits: list[ResidentVisit] = []
        self._work, self._micro_batches, self._table = work, micro_batches, table
        self._cells: list[Cell] = []
        with table.meter.watch(), making("latents"):
            self._latents = {0: _zeros(work.rows, "x", work.inputs)}
            self._labels = _zeros(work.rows, "y", LABELS)

    def visit(self, index: int) -> None:
        """A node's turn; latents that are no longer needed leave the device."""
        work, table, latents = self._work, self._table, self._latents
        table.tracker.reset_peak()
        if index == len(self._cells):
            self._cells.append(place(work, index, table, resident=True))
        sources: list[Source] = [latents[each].source(work.streams_of(index)) for each in work.sources_of(index)]
        reader = _reader(work, index, table, [*sources, self._labels.source()])
        out = DeviceLatents(work.rows * work.views, work.latent_dtype, work.emits_in_training)
        _visit(work, index, self._micro_batches[index], table, self._cells[index], reader, out)
        tracker = table.tracker
        self.visits.append(ResidentVisit(index, table.peak, tracker.peak_operation, table.timeline.changes))
        if index < work.depth:
            latents[index + 1] = out
        for number in work.sources_of(index):
            if number and (index == work.depth or number - 1 not in work.classifier_reads):
                latents.pop(number).free()


def _zeros(rows: int, stream: str, layout: RowFormat) -> DeviceLatents:
    latents = DeviceLatents(rows, layout.dtype, False)
    latents.formats[stream] = layout
    latents.tensors[stream] = torch.zeros(rows, layout.row_bytes, dtype=torch.uint8)
    return latents
