"""Brings batches from files to the device: gathered on the host ahead of time, moved one micro-batch at a time.

::

    source (file) --thread--> host buffers --copy queue--> slot on the device --decode--> streams

A cell says in which order a step reads its sources. That is a hint, by which a thread gathers the batches to
come and, on CUDA, the next micro-batch is copied while the device computes. A cell that reads otherwise gets the
same numbers, only later.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgetrain.memory import queues
from edgetrain.memory.timeline import making
from edgetrain.objectives.base import Batch as Shown
from edgetrain.objectives.base import Draws, Streams
from edgetrain.store.latents import LatentFile, Rows
from edgetrain.store.rows import RowFormat
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.prefetch import Prefetcher
from edgetrain.stream.span import Span
from edgetrain.stream.state import Host

LABELS = RowFormat((), "int64")
LABELS_ONLY = -1  # a source's number: no latents, only labels

#: Makes what a cell learns from, of decoded streams, labels [B] and the micro-batch's draws.
Prepare = Callable[[Streams, Tensor, Draws], Streams]
DrawsOf = Callable[[int, NDArray[np.int64]], StepDraws]


class Source(Protocol):
    """Where rows come from: latents in files, latents on the device, or none at all (a dry run)."""

    @property
    def formats(self) -> Mapping[str, RowFormat]:
        """Layout of each stream's rows."""
        ...

    @property
    def step_order(self) -> bool:
        """Whether rows are in the order of the epoch's steps."""
        ...

    @property
    def on_device(self) -> bool:
        """Whether ``gather`` fills tensors on the device instead of the host."""
        ...

    def begin(self) -> None:
        """Called before a range of steps is read."""
        ...

    def gather(self, rows: Rows, out: Mapping[str, Tensor]) -> None:
        """Fill each stream's rows [B, row_bytes], uint8."""
        ...


class LabelFile:
    """The labels of the data set in a file, or zeros where there are none."""

    step_order = on_device = False
    formats: Mapping[str, RowFormat] = {"y": LABELS}

    def __init__(self, file: LatentFile | None):
        self._file = file

    def begin(self) -> None:
        """See ``Source``."""
        if self._file is not None:
            self._file.distrust()

    def gather(self, rows: Rows, out: Mapping[str, Tensor]) -> None:
        """See ``Source``."""
        if self._file is None:
            out["y"].zero_()
        else:
            self._file.read(rows, out["y"])


class Reader:
    """Reads the batches of a cell's sources.

    Args:
        sources: what the cell reads; most cells have one source.
        labels: of the samples, int64.
        device: where micro-batches go.
        host: the meter's scope for host tensors.
        read_ahead: batches that a thread gathers ahead; 0: each is gathered when it is asked for.
        prepare: makes what the cell reads of decoded streams; ``None``: they are read as they are.
        slots: micro-batches on the device at once; by default what suits the device.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Source,
        device: torch.device,
        host: Host = nullcontext,
        read_ahead: int = 2,
        prepare: Prepare | None = None,
        slots: int | None = None,
    ):
        self.waited_s = 0.0
        self.sources, self.labels, self.device, self.host = sources, labels, device, host
        self.read_ahead, self.prepare = read_ahead, prepare
        self.slots = slots or slots_on(device)

    @contextmanager
    def batches(self, span: Span, reads: Sequence[int], draws: DrawsOf) -> Iterator[Iterator[Batch]]:
        """The batches of a range of steps; reading ahead ends with the scope.

        Args:
            span: the steps.
            reads: numbers of the sources in the order in which a step reads them.
            draws: gives the random numbers of a step, from its number and its samples.
        """
        for source in (*self.sources, self.labels):
            source.begin()
        transfer = _Transfer(self, span, reads)
        try:
            yield (Batch(self, transfer, span, step, draws) for step in range(span.first, span.last))
        finally:
            transfer.close()
            self.waited_s += transfer.waited_s

    def formats(self, source: int) -> dict[str, RowFormat]:
        """Layout of the rows that a micro-batch of a source holds: its streams, and labels as ``y``."""
        return {**({} if source == LABELS_ONLY else self.sources[source].formats), **self.labels.formats}

    def gather(self, source: int, span: Span, start: int, stop: int, out: Mapping[str, Tensor]) -> None:
        """Fill the rows of the samples that the epoch visits from ``start`` to before ``stop``."""
        if source != LABELS_ONLY:
            found = self.sources[source]
            found.gather(span.source_rows(start, stop, found.step_order), out)
        self.labels.gather(span.label_rows(start, stop), out)

    def is_on_device(self, source: int) -> bool:
        """Whether a source's rows are on the device."""
        return (self.labels if source == LABELS_ONLY else self.sources[source]).on_device

    def widths(self) -> list[int]:
        """Bytes of a row of the first, second, ... stream, of the source whose rows are largest."""
        numbers = [*range(len(self.sources)), LABELS_ONLY]
        formats = [[layout.row_bytes for layout in self.formats(number).values()] for number in numbers]
        count = max(map(len, formats))
        return [max(sizes[index] for sizes in formats if index < len(sizes)) for index in range(count)]


class Batch:
    """The samples of one step; its micro-batches may be read as often as the step needs.

    Attributes:
        step: number of the step in its epoch.
        number: number of the step in all epochs.
        start: row of its first sample, in the epoch's order.
        size: samples.
        draws: the step's random numbers.
    """

    def __init__(self, reader: Reader, transfer: _Transfer, span: Span, step: int, draws: DrawsOf):
        self._reader, self._transfer, self._span = reader, transfer, span
        self.step, self.number = step, span.epoch * -(-span.rows // span.batch_size) + step
        self.start, stop = span.bounds(step)
        self.size = stop - self.start
        self.draws = draws(step, span.samples(self.start, stop))

    def cuts(self) -> list[tuple[int, int]]:
        """The first row and one past the last of each micro-batch."""
        return self._span.micro_batches(self.size)

    def micro_batches(self, source: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of a source in order, each to be read before the next is asked for."""
        for first, last in self.cuts():
            slot = self._transfer.slot(_Key(self.step, source, first, last))
            yield MicroBatch(self, self._reader, slot, _Key(self.step, source, first, last))
            self._transfer.was_used(slot)


class MicroBatch:
    """Some rows of a batch, on the device.

    Attributes:
        first: its first row within the batch.
        last: one past its last row.
        start: row of its first sample, in the epoch's order.
    """

    def __init__(self, batch: Batch, reader: Reader, slot: _Slot, key: _Key):
        self.first, self.last, self.start = key.first, key.last, batch.start + key.first
        self._batch, self._reader, self._slot, self._key = batch, reader, slot, key

    def read(self) -> Shown:
        """What an objective is shown of it: decoded streams, labels and random numbers."""
        draws = self._batch.draws.of(self.first)
        with making("latents"):
            streams: Streams = self._slot.decoded(self._reader.formats(self._key.source), self.last - self.first)
            y = streams.pop("y")  # type: ignore[attr-defined]
            if self._reader.prepare is not None and self._key.source != LABELS_ONLY:
                streams = self._reader.prepare(streams, y, draws)
        return Shown(streams, y, draws)


def slots_on(device: torch.device) -> int:
    """Slots that suit a device: with a copy queue, one is filled while another is read."""
    return 2 if queues.copies_async(device) else 1


@dataclass(frozen=True)
class _Key:
    """One micro-batch of one source."""

    step: int
    source: int
    first: int
    last: int

    @property
    def batch(self) -> tuple[int, int]:
        """Step and source."""
        return self.step, self.source


class _Slot:
    """Room on the device for one micro-batch of any source, in bytes as they are on disk."""

    def __init__(self, widths: Sequence[int], rows: int, device: torch.device):
        self.holds: _Key | None = None
        self.filled: queues.Event | None = None
        self.used: queues.Event | None = None
        with making("latents"):
            self._buffers = [torch.empty(rows * width, dtype=torch.uint8, device=device) for width in widths]

    def views(self, formats: Mapping[str, RowFormat], count: int) -> dict[str, Tensor]:
        """The first ``count`` rows of each stream, [count, row_bytes]."""
        return _views(self._buffers, formats, count)

    def decoded(self, formats: Mapping[str, RowFormat], count: int) -> dict[str, Tensor]:
        """The first ``count`` rows of each stream as values."""
        return {name: formats[name].decode(rows) for name, rows in self.views(formats, count).items()}


@dataclass
class _HostBatch:
    """One batch of one source in host buffers."""

    buffers: list[Tensor]
    batch: tuple[int, int] | None = None  # step and source


class _Transfer:
    """Moves a range of steps to the device."""

    def __init__(self, reader: Reader, span: Span, reads: Sequence[int]):
        self._reader, self._span = reader, span
        self._reads = reads
        self._copies = queues.copies(reader.device)
        self._slots: list[_Slot] = []
        self._position: int | None = 0  # in the reads of a step; None: the cell reads otherwise
        self._step = span.first
        self._gathered = _Gathered(reader, span, reads)

    @property
    def waited_s(self) -> float:
        """Seconds in which a batch was not there when it was asked for."""
        return self._gathered.waited_s

    def slot(self, key: _Key) -> _Slot:
        """The slot that holds a micro-batch; computation waits until it is there."""
        slots = self._room()
        slot = next((each for each in slots if each.holds == key), slots[0])
        if slot.holds != key:
            self._fill(slot, key)
        slots.remove(slot)
        slots.append(slot)
        if slot.filled is not None:
            queues.wait(self._reader.device, slot.filled)
        if len(slots) > 1:
            self._stage(self._following(key))
        return slot

    def was_used(self, slot: _Slot) -> None:
        """The computation that reads a slot is queued."""
        slot.used = queues.record(self._reader.device)

    def close(self) -> None:
        """End the thread; what is computed next waits for copies that are still under way."""
        self._settle()
        self._gathered.close()
        if self._copies is not None:
            self._copies.before_compute()
        self._slots.clear()

    def _room(self) -> list[_Slot]:
        """The slots; made when they are first needed, so that they are metered with the first step."""
        if not self._slots:
            rows = min(self._span.micro_batch, self._span.batch_size, self._span.rows)
            widths, device = self._reader.widths(), self._reader.device
            self._slots = [_Slot(widths, rows, device) for _ in range(self._reader.slots)]
            if self._copies is not None:
                self._copies.after_compute()
        return self._slots

    def _fill(self, slot: _Slot, key: _Key) -> None:
        reader = self._reader
        views = slot.views(reader.formats(key.source), key.last - key.first)
        slot.holds = key
        if reader.is_on_device(key.source):
            if slot.filled is not None:
                slot.filled.synchronize()
            start, _ = self._span.bounds(key.step)
            with making("latents"):
                reader.gather(key.source, self._span, start + key.first, start + key.last, views)
            slot.filled = None
            return
        host = self._gathered.get(key.batch, self._settle)
        if self._copies is None:
            self._copy(host, views, key)
            return
        with self._copies.scope():
            if slot.used is not None:
                self._copies.wait(slot.used)
            self._copy(host, views, key)
            slot.filled = self._copies.record()

    def _copy(self, host: _HostBatch, views: Mapping[str, Tensor], key: _Key) -> None:
        start, stop = self._span.bounds(key.step)
        rows = _views(host.buffers, self._reader.formats(key.source), stop - start)
        for name, view in views.items():
            view.copy_(rows[name][key.first : key.last], non_blocking=self._copies is not None)

    def _stage(self, key: _Key | None) -> None:
        """Fill the slot that was not used for longest with the micro-batch that is expected next."""
        slot = self._slots[0]
        if key is not None and slot.holds != key and not self._reader.is_on_device(key.source):
            self._fill(slot, key)

    def _following(self, key: _Key) -> _Key | None:
        """The micro-batch that is expected after ``key``; ``None``: unknown, or there is none."""
        if key.step != self._step:
            self._step, self._position = key.step, 0
        expected = self._keys(key.step)
        if self._position is None or self._position >= len(expected) or expected[self._position] != key:
            self._position = None
            return None
        self._position += 1
        if self._position < len(expected):
            return expected[self._position]
        return self._keys(key.step + 1)[0] if key.step + 1 < self._span.last else None

    def _keys(self, step: int) -> list[_Key]:
        start, stop = self._span.bounds(step)
        cuts = self._span.micro_batches(stop - start)
        return [_Key(step, source, first, last) for source in self._reads for first, last in cuts]

    def _settle(self) -> None:
        """Wait until no copy reads host buffers any more."""
        for slot in self._slots:
            if slot.filled is not None:
                slot.filled.synchronize()


class _Gathered:
    """Batches in host buffers, those that are expected gathered ahead by a thread.

    Args:
        reader: gathers rows.
        span: the steps.
        reads: sources in the order in which a step reads them.
    """

    def __init__(self, reader: Reader, span: Span, reads: Sequence[int]):
        self.waited_s = 0.0
        self._reader, self._span = reader, span
        in_files = [number for number in reads if not reader.is_on_device(number)]
        self._order = [each for index, each in enumerate(in_files) if index == 0 or in_files[index - 1] != each]
        self._expected = self._batches()
        self._next = next(self._expected, None)
        self._free: queue.Queue[_HostBatch | None] = queue.Queue()
        self._current: _HostBatch | None = None
        self._spare: _HostBatch | None = None
        self._ahead: Prefetcher[_HostBatch] | None = None
        self._items: Iterator[_HostBatch] = iter(())

    def get(self, batch: tuple[int, int], settle: Callable[[], None]) -> _HostBatch:
        """A source's batch of a step; valid until another one is asked for.

        Args:
            batch: step and source.
            settle: waits until no copy reads host buffers any more.
        """
        if self._current is not None and self._current.batch == batch:
            return self._current
        if self._spare is not None and self._spare.batch == batch:
            return self._spare
        settle()
        while self._next is not None and self._next[0] < batch[0]:  # of a step that read less than expected
            self._advance()
        if self._next != batch:
            return self._unexpected(batch)
        return self._advance()

    def close(self) -> None:
        """End the thread."""
        self._free.put(None)  # the thread may be waiting for a buffer
        if self._ahead is not None:
            self._ahead.close()
            self.waited_s = self._ahead.waited_s
        self._ahead, self._items = None, iter(())  # which refer back to this

    def _batches(self) -> Iterator[tuple[int, int]]:
        """(step, source) of each batch, in the order in which they are expected."""
        return ((step, source) for step in range(self._span.first, self._span.last) for source in self._order)

    def _advance(self) -> _HostBatch:
        if self._ahead is None:
            for _ in range(self._reader.read_ahead + 2):  # one that is filled and one that is read
                self._free.put(self._buffers())
            self._ahead = Prefetcher(self._produce, self._reader.read_ahead)
            self._items = iter(self._ahead)
        if self._current is not None:
            self._free.put(self._current)
        self._current = next(self._items)
        self._next = next(self._expected, None)
        return self._current

    def _produce(self) -> Iterator[_HostBatch]:
        for batch in self._batches():
            if (buffers := self._free.get()) is None:
                return
            yield self._filled(buffers, batch)

    def _unexpected(self, batch: tuple[int, int]) -> _HostBatch:
        """A batch that no thread gathers."""
        self._spare = self._filled(self._spare or self._buffers(), batch)
        return self._spare

    def _filled(self, host: _HostBatch, batch: tuple[int, int]) -> _HostBatch:
        step, source = batch
        start, stop = self._span.bounds(step)
        views = _views(host.buffers, self._reader.formats(source), stop - start)
        self._reader.gather(source, self._span, start, stop, views)
        host.batch = batch
        return host

    def _buffers(self) -> _HostBatch:
        rows, device = min(self._span.batch_size, self._span.rows), self._reader.device
        with self._reader.host():
            widths = self._reader.widths()
            return _HostBatch([queues.staging((rows * width,), torch.uint8, device) for width in widths])


def _views(buffers: Sequence[Tensor], formats: Mapping[str, RowFormat], count: int) -> dict[str, Tensor]:
    """The first ``count`` rows of each stream in buffers that are large enough, [count, row_bytes]."""
    return {
        name: buffer[: count * layout.row_bytes].view(count, layout.row_bytes)
        for (name, layout), buffer in zip(formats.items(), buffers, strict=False)
    }
