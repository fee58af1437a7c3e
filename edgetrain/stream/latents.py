"""The latents between cells, in files or on the device, and the sinks that write them.

Row order: *sample order* (row r is sample r; written by finished cells, read in a new order each
epoch) or *step order* (row r is the r-th sample that the epoch visits; written while training, read
straight through).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import RowFormat
from edgetrain.stream.cell import Host


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
        """What to give freshly emitted rows to; closing it makes them readable."""
        ...

    def free(self) -> None:
        """Give the space back."""
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
    ):
        self.rows, self.step_order, self.first = rows, step_order, first
        self.files: dict[str, LatentFile] = {}
        self.host, self.on_write, self.background = host, on_write, background
        self._folder, self._name, self._dtype, self._window = folder, name, dtype, window
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

    def file(self, stream: str, shape: tuple[int, ...]) -> LatentFile:
        """The stream's file, allocated when its first rows come."""
        if stream not in self.files:
            path = self._folder / f"{self._name}.{stream}.rows"
            file = LatentFile(path, self.rows, RowFormat(shape, self._dtype), self._window, self.first).allocate()
            self.files[stream] = file
            self._on_space(file.size)
        return self.files[stream]

    def reused(self, name: str, step_order: bool, first: int = 0) -> FileLatents:
        """The same files under another name, to be overwritten with other latents of the same shape."""
        for stream, file in self.files.items():
            file.rename(self._folder / f"{name}.{stream}.rows")
            file.first = first
        self._name, self.step_order, self.first = name, step_order, first
        return self

    def free(self) -> None:
        """Delete the files."""
        for file in self.files.values():
            file.delete()
            self._on_space(-file.size)
        self.files.clear()


def _ignore(size: int) -> None:
    """Nobody counts."""


class FileSink:
    """Copies rows to host buffers, then encodes and writes them, in a thread if asked."""

    _PENDING = 2  # writes that may wait, each with its buffer

    def __init__(self, latents: FileLatents):
        self._latents = latents
        self._writer = ThreadPoolExecutor(1, "edgetrain-write") if latents.background else None
        self._pending: deque[tuple[str, Future[None], Tensor]] = deque()
        self._spare: dict[str, list[Tensor]] = {}

    def put(self, first: int, streams: Mapping[str, Tensor]) -> None:
        """See ``Sink``."""
        for stream, values in streams.items():
            with self._latents.host():
                buffer = self._buffer(stream, values)
                rows = buffer[: values.shape[0]]
                rows.copy_(values)
            if self._writer is None:
                with self._latents.host():
                    self._write(stream, first, rows)
                self._spare.setdefault(stream, []).append(buffer)
                continue
            self._pending.append((stream, self._writer.submit(self._write, stream, first, rows), buffer))
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

    def _buffer(self, stream: str, values: Tensor) -> Tensor:
        spare = self._spare.setdefault(stream, [])
        if spare and spare[-1].shape[0] >= values.shape[0]:
            return spare.pop()
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda")

    def _settle(self) -> None:
        stream, done, buffer = self._pending.popleft()
        done.result()
        self._spare.setdefault(stream, []).append(buffer)

    def _write(self, stream: str, first: int, rows: Tensor) -> None:
        file = self._latents.file(stream, tuple(rows.shape[1:]))
        self._latents.on_write(file.write(first, file.format.encode(rows)))


class DeviceLatents:
    """Latents that stay on the device, encoded as they would be in a file."""

    def __init__(self, rows: int, dtype: str, step_order: bool):
        self.rows, self.step_order = rows, step_order
        self.formats: dict[str, RowFormat] = {}
        self.tensors: dict[str, Tensor] = {}
        self._dtype = dtype

    @classmethod
    def copied(cls, source: FileLatents, device: torch.device, host: Host) -> DeviceLatents:
        """The device's copy of latents in files."""
        latents = cls(source.rows, "float32", source.step_order)
        for stream, file in source.files.items():
            latents.formats[stream] = file.format
            latents.tensors[stream] = _load(file, device, host)
        return latents

    def sink(self) -> DeviceLatents:
        """See ``Latents``: rows are on the device already."""
        return self

    def put(self, first: int, streams: Mapping[str, Tensor]) -> None:
        """See ``Sink``."""
        for stream, values in streams.items():
            if stream not in self.tensors:
                layout = RowFormat(tuple(values.shape[1:]), self._dtype)
                self.formats[stream] = layout
                self.tensors[stream] = torch.empty(self.rows, layout.row_bytes, dtype=torch.uint8, device=values.device)
            encoded = self.formats[stream].encode(values)
            self.tensors[stream][first : first + values.shape[0]].copy_(encoded)

    def close(self) -> None:
        """See ``Sink``: there is nothing to wait for."""

    def free(self) -> None:
        """Give the device's memory back."""
        self.tensors.clear()


def _load(file: LatentFile, device: torch.device, host: Host, step: int = 4096) -> Tensor:
    out = torch.empty(file.rows, file.format.row_bytes, dtype=torch.uint8, device=device)
    with host():
        buffer = torch.empty(min(step, file.rows), file.format.row_bytes, dtype=torch.uint8)
    for first in range(0, file.rows, step):
        last = min(first + step, file.rows)
        file.read(slice(first, last), buffer[: last - first])
        out[first:last].copy_(buffer[: last - first])
    return out
