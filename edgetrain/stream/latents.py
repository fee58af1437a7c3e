"""The latents between cells, in files or on the device, and the sinks that write them.

Row order: *sample order* (row r is sample r; written by finished cells, read in a new order each
epoch) or *step order* (row r is the r-th sample that the epoch visits; written while training, read
straight through).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from edgetrain.memory import queues
from edgetrain.memory.timeline import making
from edgetrain.store.entries import LatentStream
from edgetrain.store.latents import LatentFile, Rows
from edgetrain.store.rows import RowFormat
from edgetrain.stream.state import Host

if TYPE_CHECKING:
    from edgetrain.stream.reader import Source

_COPIED_ROWS = 4096  # at once, between files and the device
_HOST = torch.device("cpu")


class Latents(Protocol):
    """One node's latents for a set of samples.

    Attributes:
        rows: number of samples.
        step_order: whether rows stand in the order of the epoch's steps.
    """

    rows: int
    step_order: bool

    @property
    def formats(self) -> Mapping[str, RowFormat]:
        """Layout of each stream's rows; empty until the first rows came."""
        ...

    def sink(self) -> Sink:
        """Takes rows as they are emitted; closing it makes them readable."""
        ...

    def source(self, streams: Iterable[str] | None = None) -> Source:
        """What a reader reads; only of some streams, or of all (``None``)."""
        ...

    def free(self) -> None:
        """Give the space back."""
        ...

    def alive(self) -> bool:
        """Whether any number that was written is not zero."""
        ...


class Sink(Protocol):
    """Takes emitted latents in the order in which they come."""

    def put(self, first: int, streams: Mapping[str, Tensor]) -> None:
        """Rows [B, ...] of each stream for row numbers first..first+B-1; they are copied before this returns."""
        ...

    def close(self) -> None:
        """Wait until all rows are written; raises what went wrong."""
        ...


class FileLatents:
    """Latents in memory-mapped files, one for each stream.

    Args:
        folder: where the files go.
        name: their common name.
        rows: number of samples.
        dtype: of the rows on disk, one of ``LATENT_DTYPES``.
        step_order: see ``Latents``.
        host: the meter's scope for host tensors.
        on_space: told of bytes allocated (negative: freed).
        on_write: told of bytes written.
        background: whether a thread writes while the device computes.
        window: bytes of mapped pages to hold.
        first: number of the first row, where only a range of an epoch is held.
        device: where rows come from.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        rows: int,
        dtype: str,
        step_order: bool,
        host: Host,
        on_space: Callable[[int], None],
        on_write: Callable[[int], None],
        background: bool = True,
        window: int = 16 << 20,
        first: int = 0,
        device: torch.device = _HOST,
    ):
        self.rows, self.step_order, self.first, self._alive = rows, step_order, first, False
        self.files: dict[str, LatentFile] = {}
        self.host, self.on_write, self.background = host, on_write, background
        self.dtype, self.device = dtype, device
        self._folder, self._name, self._window = folder, name, window
        self._on_space = on_space

    @classmethod
    def of_files(cls, files: dict[str, LatentFile], host: Host) -> FileLatents:
        """Latents that lie in files already, in sample order (the prepared data set)."""
        first = next(iter(files.values()))
        latents = cls(first.path.parent, first.path.stem, first.rows, "float32", False, host, _ignore, _ignore)
        latents.files = dict(files)
        return latents

    @property
    def formats(self) -> dict[str, RowFormat]:
        """See ``Latents``."""
        return {stream: file.format for stream, file in self.files.items()}

    def sink(self) -> FileSink:
        """See ``Latents``."""
        return FileSink(self)

    def source(self, streams: Iterable[str] | None = None) -> FileSource:
        """See ``Latents``."""
        names = self.files if streams is None else streams
        return FileSource({name: self.files[name] for name in names}, self.step_order)

    def file(self, stream: str, shape: tuple[int, ...]) -> LatentFile:
        """The stream's file, allocated when its first rows come."""
        if stream not in self.files:
            path = self._folder / f"{self._name}.{stream}.rows"
            file = LatentFile(path, self.rows, RowFormat(shape, self.dtype), self._window, self.first).allocate()
            self.files[stream] = file
            self._on_space(file.size)
        return self.files[stream]

    def reused(self, name: str, step_order: bool, first: int = 0) -> FileLatents:
        """The same files under another name, to be overwritten with other latents of the same shape."""
        for stream, file in self.files.items():
            file.restart(self._folder / f"{name}.{stream}.rows", first)
        self._name, self.step_order, self.first, self._alive = name, step_order, first, False
        return self

    def save(self, number: int) -> list[LatentStream]:
        """Make what was written durable, as part of the checkpoint of that number.

        Raises:
            StorageError: the disk refused.
        """
        return [
            LatentStream(stream, file.path.name, list(file.format.shape), file.written, file.save(number))
            for stream, file in self.files.items()
        ]

    def settle(self) -> None:
        """The newest checkpoint counts; what only the one before it needed may go."""
        for file in self.files.values():
            file.settle()

    def reopen(self, streams: Iterable[LatentStream]) -> FileLatents:
        """Open and verify the files of a checkpoint.

        Raises:
            CorruptError: a file does not hold what was saved.
            StorageError: one is missing or unreadable.
        """
        for known in streams:
            layout = RowFormat(tuple(known.shape), self.dtype)
            file = LatentFile(self._folder / known.file, self.rows, layout, self._window, self.first)
            self.files[known.stream] = file
            file.reopen(known.written, known.sums)
            self._alive = self._alive or known.written > 0  # it was looked at when it was written
            self._on_space(file.size)
        return self

    def digest(self) -> str:
        """A checksum of all rows of all streams, in hex."""
        return "".join(file.digest() for _, file in sorted(self.files.items()))

    def see(self, rows: Tensor) -> None:
        """Look at rows that are about to be written, until a number is not zero."""
        self._alive = self._alive or bool(rows.any())

    def alive(self) -> bool:
        """See ``Latents``."""
        return self._alive

    def close(self) -> None:
        """Close the files and leave them."""
        for file in self.files.values():
            file.close()

    def free(self) -> None:
        """Delete the files."""
        for file in self.files.values():
            file.delete()
            self._on_space(-file.size)
        self.files.clear()


def _ignore(size: int) -> None:
    """Nobody counts."""


class FileSource:
    """Implements ``stream.reader.Source`` for latents in files."""

    on_device = False

    def __init__(self, files: Mapping[str, LatentFile], step_order: bool):
        self._files, self.step_order = files, step_order
        self.formats = {name: file.format for name, file in files.items()}

    def begin(self) -> None:
        """See ``Source``."""
        for file in self._files.values():
            file.distrust()

    def gather(self, rows: Rows, out: Mapping[str, Tensor]) -> None:
        """See ``Source``."""
        for name, file in self._files.items():
            file.read(rows, out[name])


class FileSink:
    """Encodes rows where they are, copies them to host buffers and writes them, in a thread if asked."""

    _PENDING = 2  # writes that may wait, each with its buffer

    def __init__(self, latents: FileLatents):
        self._latents = latents
        self._writer = ThreadPoolExecutor(1, "edgetrain-write") if latents.background else None
        self._pending: deque[tuple[str, Future[None], Tensor]] = deque()
        self._spare: dict[str, list[Tensor]] = {}

    def put(self, first: int, streams: Mapping[str, Tensor]) -> None:
        """See ``Sink``."""
        for stream, values in streams.items():
            shape = tuple(values.shape[1:])
            with making("latents"):
                encoded = RowFormat(shape, self._latents.dtype).encode(values)
            with self._latents.host():
                buffer = self._buffer(stream, encoded)
                rows = buffer[: len(encoded)]
                rows.copy_(encoded)
            del encoded
            if self._writer is None:
                with self._latents.host():
                    self._write(stream, shape, first, rows)
                self._spare.setdefault(stream, []).append(buffer)
                continue
            self._pending.append((stream, self._writer.submit(self._write, stream, shape, first, rows), buffer))
            while len(self._pending) > self._PENDING:
                self._settle()

    def close(self) -> None:
        """See ``Sink``."""
        try:
            while self._pending:
                self._settle()
        finally:
            if self._writer is not None:
                self._writer.shutdown(cancel_futures=True)

    def _buffer(self, stream: str, encoded: Tensor) -> Tensor:
        spare = self._spare.setdefault(stream, [])
        if spare and len(spare[-1]) >= len(encoded):
            return spare.pop()
        return queues.staging(tuple(encoded.shape), torch.uint8, self._latents.device)

    def _settle(self) -> None:
        stream, done, buffer = self._pending.popleft()
        done.result()
        self._spare.setdefault(stream, []).append(buffer)

    def _write(self, stream: str, shape: tuple[int, ...], first: int, rows: Tensor) -> None:
        file = self._latents.file(stream, shape)
        self._latents.see(file.format.decode(rows))
        self._latents.on_write(file.write(first, rows))


class DeviceLatents:
    """Latents that stay on the device, encoded as they would be in a file."""

    def __init__(self, rows: int, dtype: str, step_order: bool):
        self.rows, self.step_order, self.written = rows, step_order, 0
        self.formats: dict[str, RowFormat] = {}
        self.tensors: dict[str, Tensor] = {}
        self._dtype = dtype

    @classmethod
    def copied(cls, source: FileLatents, device: torch.device, host: Host) -> DeviceLatents:
        """The device's copy of latents in files."""
        latents = cls(source.rows, source.dtype, source.step_order)
        for stream, file in source.files.items():
            latents.formats[stream] = file.format
            latents.tensors[stream] = _load(file, device, host)
            latents.written = file.written
        return latents

    def sink(self) -> DeviceLatents:
        """See ``Latents``: rows are on the device already."""
        return self

    def source(self, streams: Iterable[str] | None = None) -> DeviceSource:
        """See ``Latents``."""
        names = self.tensors if streams is None else streams
        return DeviceSource({name: self.tensors[name] for name in names}, self.formats, self.step_order)

    def put(self, first: int, streams: Mapping[str, Tensor]) -> None:
        """See ``Sink``."""
        for stream, values in streams.items():
            if stream not in self.tensors:
                layout = RowFormat(tuple(values.shape[1:]), self._dtype)
                self.formats[stream] = layout
                with making("latents"):
                    room = values.new_empty(self.rows, layout.row_bytes, dtype=torch.uint8)
                self.tensors[stream] = room
            encoded = self.formats[stream].encode(values)
            self.written = first + values.shape[0]
            self.tensors[stream][first : self.written].copy_(encoded)

    def close(self) -> None:
        """See ``Sink``: there is nothing to wait for."""

    def free(self) -> None:
        """Give the device's memory back."""
        self.tensors.clear()

    def alive(self) -> bool:
        """See ``Latents``; this waits for the device."""
        return any(bool(rows.any()) for rows in self.tensors.values())

    def copy_to(self, target: FileLatents) -> FileLatents:
        """Write the rows that are there to files, in the same order."""
        for stream, values in self.tensors.items():
            file = target.file(stream, self.formats[stream].shape)
            for first in range(0, self.written, _COPIED_ROWS):
                with target.host():
                    rows = values[first : min(first + _COPIED_ROWS, self.written)].to("cpu", copy=True)
                target.on_write(file.write(target.first + first, rows))
        return target


class DeviceSource:
    """Implements ``stream.reader.Source`` for latents on the device.

    Args:
        tensors: of each stream, [rows, row_bytes], uint8.
        formats: of the streams.
        step_order: see ``Latents``.
    """

    on_device = True

    def __init__(self, tensors: Mapping[str, Tensor], formats: Mapping[str, RowFormat], step_order: bool):
        self._tensors, self.step_order = tensors, step_order
        self.formats = {name: formats[name] for name in tensors}

    def begin(self) -> None:
        """See ``Source``: there is nothing to do."""

    def gather(self, rows: Rows, out: Mapping[str, Tensor]) -> None:
        """See ``Source``."""
        index: Tensor | None = None
        for name, matrix in self._tensors.items():
            if isinstance(rows, slice):
                out[name].copy_(matrix[rows])
                continue
            if index is None:
                index = matrix.new_empty(len(rows), dtype=torch.int64).copy_(torch.from_numpy(rows))
            torch.index_select(matrix, 0, index, out=out[name])


def _load(file: LatentFile, device: torch.device, host: Host) -> Tensor:
    """A file's rows on the device; those that are not written yet have room."""
    with making("latents"):
        out = torch.empty(file.rows, file.format.row_bytes, dtype=torch.uint8, device=device)
    with host():
        buffer = torch.empty(min(_COPIED_ROWS, file.rows), file.format.row_bytes, dtype=torch.uint8)
    for first in range(0, file.written, _COPIED_ROWS):
        last = min(first + _COPIED_ROWS, file.written)
        file.read(slice(file.first + first, file.first + last), buffer[: last - first])
        out[first:last].copy_(buffer[: last - first])
    return out
