"""Latents of the whole data set on disk: one file of fixed-size rows for each stream.

Rows are written in runs with ``pwrite`` (no mapping, so no SIGBUS when the disk is full) into a file
whose space was allocated first. Runs are read with ``pread``. Scattered rows come from a memory map
while the file is small; from a larger file they are read one by one: where the page cache uses large
folios, a fault maps a whole folio, so that gathering 128 rows of 3 KiB made 170 MiB resident, and
dropping the pages afterwards is too late.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgetrain.errors import CorruptError, StorageError
from edgetrain.store.atomic import storage_errors
from edgetrain.store.rows import RowFormat

DEFAULT_WINDOW = 16 << 20  # bytes of the largest file that is mapped
Rows = slice | NDArray[np.int64]


class LatentFile:
    """``rows`` rows of one stream in one file; safe for one writer and one reader thread.

    Args:
        path: the file.
        rows: number of rows.
        format: layout of a row.
        window: bytes that a map of the file may make resident; larger files are not mapped.
        first: number of the file's first row; such a file is read in runs only.
    """

    def __init__(self, path: Path, rows: int, format: RowFormat, window: int = DEFAULT_WINDOW, first: int = 0):
        self.path, self.rows, self.format, self.window, self.first = path, rows, format, window, first
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None
        self._matrix: NDArray[np.uint8] | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.rows * self.format.row_bytes

    def allocate(self) -> LatentFile:
        """Create the file and reserve its space.

        Raises:
            StorageError: the disk is full, read-only, or failed.
        """
        with storage_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _reserve(self._descriptor, self.size)
            except OSError:
                self.close()
                self.path.unlink()
                raise
        return self

    def open(self) -> LatentFile:
        """Open an existing file.

        Raises:
            CorruptError: its size is not that of the rows it should hold.
            StorageError: it is missing or unreadable.
        """
        with storage_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDONLY)
            found = os.fstat(self._descriptor).st_size
        if found != self.size:
            raise CorruptError(f"{self.path}: holds {found} bytes, expected {self.size}; delete it and rerun")
        return self

    def write(self, first: int, encoded: torch.Tensor) -> int:
        """Write encoded rows [B, row_bytes] from row number ``first`` on; returns the bytes written."""
        with storage_errors(self.path):
            left = encoded.numpy().data.cast("B")
            offset = (first - self.first) * self.format.row_bytes
            while left:
                done = os.pwrite(self._fd, left, offset)
                left, offset = left[done:], offset + done
        return encoded.numel()

    def read(self, rows: Rows, out: torch.Tensor) -> None:
        """Copy rows, a slice or an int64 index array [B], into ``out`` [B, row_bytes], uint8.

        Raises:
            StorageError: the medium failed or the file ended early.
        """
        target = out.numpy()
        if isinstance(rows, slice):
            self._read_run(rows, target)
        else:
            self._gather(rows, target)

    def rename(self, path: Path) -> None:
        """Give the open file another name."""
        with storage_errors(self.path):
            self.path.rename(path)
        self.path = path

    def close(self) -> None:
        """Unmap and close; closing twice is harmless."""
        self._matrix = None
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        with storage_errors(self.path):
            self.path.unlink(missing_ok=True)

    @property
    def _fd(self) -> int:
        if self._descriptor is None:
            raise StorageError(f"{self.path}: read or written after it was closed")
        return self._descriptor

    def _read_run(self, rows: slice, target: NDArray[np.uint8]) -> None:
        left = target.data.cast("B")
        offset = (rows.start - self.first) * self.format.row_bytes
        with storage_errors(self.path):
            while left:
                done = os.preadv(self._fd, [left], offset)
                if done == 0:
                    raise StorageError(f"{self.path}: ends at byte {offset}, expected {self.size}")
                left, offset = left[done:], offset + done

    def _gather(self, rows: NDArray[np.int64], target: NDArray[np.uint8]) -> None:
        if self.size > self.window:
            self._gather_one_by_one(rows, target)
            return
        if self._matrix is None:
            self._matrix = self._mapped()
        # mode="clip" lets take write straight into the target; the indices are ours and in range.
        np.take(self._matrix, rows, axis=0, out=target, mode="clip")

    def _gather_one_by_one(self, rows: NDArray[np.int64], target: NDArray[np.uint8]) -> None:
        descriptor, size = self._fd, self.format.row_bytes
        with storage_errors(self.path):
            for row, offset in zip(target, (rows * size).tolist(), strict=True):
                if os.preadv(descriptor, (row,), offset) != size:
                    raise StorageError(f"{self.path}: ends within a row at byte {offset}, expected {self.size}")

    def _mapped(self) -> NDArray[np.uint8]:
        with storage_errors(self.path):
            if (found := os.fstat(self._fd).st_size) < self.size:
                raise StorageError(f"{self.path}: ends at byte {found}, expected {self.size}")
            self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, np.uint8).reshape(self.rows, self.format.row_bytes)


def _reserve(descriptor: int, size: int) -> None:
    """Allocate ``size`` bytes, so that a full disk is an error now and not a dead process later."""
    if size == 0:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS has no posix_fallocate; writes there still report a full disk, one by one
        os.ftruncate(descriptor, size)
