"""Brings a visit's batches to the device, one micro-batch at a time.

A visit is flattened into a sequence of *parts*: for each step, for each phase of the objective, for
each micro-batch. From files, a thread gathers the next batches into host buffers and, on CUDA, a
copy stream moves the next part while the device computes. On the device, rows are picked where they lie.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgetrain.memory.timeline import making
from edgetrain.store.latents import LatentFile, Rows
from edgetrain.store.rows import RowFormat
from edgetrain.stream.cell import Host
from edgetrain.stream.latents import DeviceLatents, FileLatents
from edgetrain.stream.prefetch import Prefetcher

LABELS = RowFormat((), "int64")


@dataclass(frozen=True)
class Slice:
    """A contiguous range of steps of one epoch, and how each step is cut.

    Attributes:
        rows: samples in the data set.
        batch_size: samples of a step; the last step of an epoch may be shorter.
        micro_batch: samples that are on the device at once.
        first: first step of the range.
        last: one behind the last step.
        order: the epoch's order of samples [rows], int64; ``None``: as they lie.
        phases: passes over each batch.
        view: of several cached views of the data set, the one whose latents are read.
    """

    rows: int
    batch_size: int
    micro_batch: int
    first: int
    last: int
    order: NDArray[np.int64] | None = None
    phases: int = 1
    view: int = 0

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(step, first row, one behind the last row) of each step, rows counted in the epoch's order."""
        for step in range(self.first, self.last):
            start = step * self.batch_size
            yield step, start, min(start + self.batch_size, self.rows)

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers of the samples that the epoch visits from ``start`` to before ``stop``."""
        return np.arange(start, stop) if self.order is None else self.order[start:stop]

    def source_rows(self, start: int, stop: int, step_order: bool) -> Rows:
        """Rows of the parent's latents that hold these samples; views lie one behind the other."""
        if step_order or self.order is None:
            shift = 0 if step_order else self.view * self.rows
            return slice(start + shift, stop + shift)
        return self.order[start:stop] + self.view * self.rows

    def parts(self, size: int) -> Iterator[tuple[int, int, int, bool]]:
        """(phase, first, last, closes) of each part of a step with ``size`` rows."""
        for phase in range(self.phases):
            for first in range(0, size, self.micro_batch):
                last = min(first + self.micro_batch, size)
                yield phase, first, last, last == size


@dataclass
class Part:
    """One micro-batch on the device.

    Attributes:
        step: number of the step in its epoch.
        phase: number of the objective's phase.
        start: row of the batch's first sample, in the epoch's order.
        size: samples in the batch.
        first: first row of this part within the batch.
        last: one behind its last row.
        closes: whether the phase's gradients are complete with this part.
        streams: decoded latents [last - first, ...].
        y: labels [last - first], int64.
    """

    step: int
    phase: int
    start: int
    size: int
    first: int
    last: int
    closes: bool
    streams: Mapping[str, Tensor]
    y: Tensor

    @property
    def stop(self) -> int:
        """One behind the batch's last row, in the epoch's order."""
        return self.start + self.size


class Feed(Protocol):
    """Gives a visit's parts."""

    waited_s: float

    def parts(self, work: Slice) -> Iterator[Part]:
        """The parts of ``work``, in order; each is valid until the next is asked for."""
        ...


@dataclass
class HostBatch:
    """One batch in host buffers by stream (labels: ``y``), bytes as on disk: [size, row_bytes], uint8."""

    step: int
    start: int
    size: int
    buffers: dict[str, Tensor]


class FileFeed:
    """Parts of latents that lie in files.

    Args:
        source: the parent's latents; their streams are what parts show.
        labels: file of int64 labels in sample order; ``None``: all labels are 0 (rows to predict on).
        device: where parts go.
        host: the meter's scope for host tensors.
        depth: batches gathered ahead; 0 gathers each when it is needed.
    """

    def __init__(
        self, source: FileLatents, labels: LatentFile | None, device: torch.device, host: Host, depth: int = 2
    ):
        self.waited_s = 0.0
        self._source, self._labels, self._device, self._host, self._depth = (
            source,
            labels,
            device,
            host,
            depth,
        )

    def parts(self, work: Slice) -> Iterator[Part]:
        """See ``Feed``."""
        free: queue.Queue[HostBatch | None] = queue.Queue()
        for _ in range(self._depth + 2):  # one being filled, one in use
            free.put(self._buffers(min(work.batch_size, work.rows)))
        formats = {**self._source.formats, "y": LABELS}
        for file in filter(None, (*self._source.files.values(), self._labels)):
            file.distrust()
        with Prefetcher(lambda: self._gather(work, free), self._depth) as batches:
            try:
                transfer = Transfer(formats, self._device, work.micro_batch, slots_on(self._device))
                yield from transfer.parts(work, batches, free.put)
            finally:
                free.put(None)  # the thread may be waiting for a buffer
                self.waited_s += batches.waited_s

    def _buffers(self, rows: int) -> HostBatch:
        pinned = self._device.type == "cuda"
        with self._host():
            buffers = {
                stream: torch.zeros(rows, layout.row_bytes, dtype=torch.uint8, pin_memory=pinned)
                for stream, layout in {**self._source.formats, "y": LABELS}.items()
            }
        return HostBatch(0, 0, 0, buffers)

    def _gather(self, work: Slice, free: queue.Queue[HostBatch | None]) -> Iterator[HostBatch]:
        for step, start, stop in work.steps():
            batch = free.get()
            if batch is None:
                return
            batch.step, batch.start, batch.size = step, start, stop - start
            rows = work.source_rows(start, stop, self._source.step_order)
            for stream, file in self._source.files.items():
                file.read(rows, batch.buffers[stream][: batch.size])
            if self._labels is not None:
                labelled = slice(start, stop) if work.order is None else work.order[start:stop]
                self._labels.read(labelled, batch.buffers["y"][: batch.size])
            yield batch


def slots_on(device: torch.device) -> int:
    """Slots that a transfer to a device uses: on CUDA a copy stream fills one ahead of the computation."""
    return 2 if device.type == "cuda" else 1


class Transfer:
    """Moves parts of host batches into slots on the device and decodes them there.

    Args:
        formats: of the streams, and of the labels as ``y``.
        device: where the slots are.
        rows: of a slot.
        slots: how many; all but one are filled ahead.
    """

    def __init__(self, formats: Mapping[str, RowFormat], device: torch.device, rows: int, slots: int):
        self._formats = formats
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slots = [_Slot(formats, device, rows) for _ in range(slots)]

    def parts(self, work: Slice, batches: Iterable[HostBatch], release: Callable[[HostBatch], None]) -> Iterator[Part]:
        """The parts of each batch; ``release`` is called when a batch's buffers may be reused."""
        staged: deque[tuple[_Slot, HostBatch, _Cut]] = deque()
        for batch in batches:
            for cut in work.parts(batch.size):
                slot = self._slots[0]
                self._slots.append(self._slots.pop(0))
                self._fill(slot, batch, cut)
                staged.append((slot, batch, cut))
                if len(staged) == len(self._slots):
                    yield from self._use(work, *staged.popleft(), release)
        while staged:
            yield from self._use(work, *staged.popleft(), release)

    def _fill(self, slot: _Slot, batch: HostBatch, cut: _Cut) -> None:
        _, first, last, _ = cut
        if self._copies is None:
            slot.fill(batch, first, last)
            return
        with torch.cuda.stream(self._copies):
            if slot.used is not None:  # the last computation that read this slot
                self._copies.wait_event(slot.used)
            slot.fill(batch, first, last)
            slot.filled = self._copies.record_event()

    def _use(
        self, work: Slice, slot: _Slot, batch: HostBatch, cut: _Cut, release: Callable[[HostBatch], None]
    ) -> Iterator[Part]:
        phase, first, last, closes = cut
        if slot.filled is not None:
            torch.cuda.current_stream().wait_event(slot.filled)
        with making("latents"):
            values = {name: layout.decode(slot.rows(name, last - first)) for name, layout in self._formats.items()}
        y = values.pop("y")
        yield Part(batch.step, phase, batch.start, batch.size, first, last, closes, values, y)
        if slot.filled is not None:
            slot.used = torch.cuda.current_stream().record_event()
            slot.filled.synchronize()
        if closes and phase == work.phases - 1:
            release(batch)


_Cut = tuple[int, int, int, bool]


class _Slot:
    """Device buffers for one part, bytes as they lie on disk."""

    def __init__(self, formats: Mapping[str, RowFormat], device: torch.device, rows: int):
        self.filled: torch.cuda.Event | None = None
        self.used: torch.cuda.Event | None = None
        with making("latents"):
            self._buffers = {
                stream: torch.empty(rows, layout.row_bytes, dtype=torch.uint8, device=device)
                for stream, layout in formats.items()
            }

    def fill(self, batch: HostBatch, first: int, last: int) -> None:
        """Copy rows first..last-1 of the batch to the start of the slot."""
        for stream, buffer in self._buffers.items():
            buffer[: last - first].copy_(batch.buffers[stream][first:last], non_blocking=True)

    def rows(self, stream: str, count: int) -> Tensor:
        """The first rows of the slot, [count, row_bytes]."""
        return self._buffers[stream][:count]


class DeviceFeed:
    """Parts of latents that lie on the device.

    Args:
        source: the parent's latents.
        labels: [rows], int64, on the device, in sample order.
    """

    def __init__(self, source: DeviceLatents, labels: Tensor):
        self.waited_s = 0.0
        self._source, self._labels = source, labels

    def parts(self, work: Slice) -> Iterator[Part]:
        """See ``Feed``."""
        for step, start, stop in work.steps():
            for phase, first, last, closes in work.parts(stop - start):
                rows = work.source_rows(start + first, start + last, self._source.step_order)
                with making("latents"):
                    streams = {
                        stream: layout.decode(picked(self._source.tensors[stream], rows))
                        for stream, layout in self._source.formats.items()
                    }
                    y = labels_of(self._labels, work, start + first, start + last)
                yield Part(step, phase, start, stop - start, first, last, closes, streams, y)


def picked(matrix: Tensor, rows: Rows) -> Tensor:
    """A copy of rows of a matrix on the device.

    Runs are copied as well, as a streamed slot is: kernels give other last bits where rows start unaligned.
    """
    return matrix[rows].clone() if isinstance(rows, slice) else matrix.index_select(0, _index(rows, matrix.device))


def labels_of(labels: Tensor, work: Slice, start: int, stop: int) -> Tensor:
    """Labels [stop - start] of the samples that an epoch visits from ``start`` on."""
    return labels[start:stop] if work.order is None else labels[_index(work.order[start:stop], labels.device)]


def _index(samples: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.empty(len(samples), dtype=torch.int64, device=device).copy_(torch.from_numpy(samples))
