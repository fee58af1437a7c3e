"""Latents of the whole data set on disk: one file of fixed-size rows for each stream.

Rows are written in runs with ``pwrite`` (no mapping, so no SIGBUS when the disk is full) into a file
whose space was allocated first. Runs are read with ``pread``. Scattered rows come from a memory map
while the file is small; from a larger file they are read one by one: where the page cache uses large
folios, a fault maps a whole folio, so that gathering 128 rows of 3 KiB made 170 MiB resident, and
dropping the pages afterwards is too late.

Each block of rows has a checksum, taken as it is written and compared when the block is first read again
in an epoch, so that the medium's errors are found before anything is learned from them.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from edgetrain.errors import CorruptError, DamagedLatentsError, StorageError
from edgetrain.store.atomic import reserve, storage_errors, verify, write_bytes
from edgetrain.store.entries import FileEntry
from edgetrain.store.rows import RowFormat

DEFAULT_WINDOW = 16 << 20  # bytes of the largest file that is mapped
BLOCK_BYTES = 256 << 10  # of the rows that share a checksum, unless one row is larger
Rows = slice | NDArray[np.int64]


class LatentFile:
    """``rows`` rows of one stream in one file; safe for one writer and one reader thread.

    Rows are written in order, from the first on.

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
        self.written = 0
        self._block = max(1, BLOCK_BYTES // format.row_bytes)  # rows
        self._sums = np.zeros(-(-rows // self._block), np.uint64)
        self._verified = np.zeros(len(self._sums), bool)
        self._sums_files: list[Path] = []
        self._running = xxhash.xxh3_64()  # over the block that is being written

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
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            try:
                reserve(self._descriptor, self.size)
            except OSError:
                self.close()
                self.path.unlink()
                raise
        return self

    def save(self, number: int) -> FileEntry:
        """Make the rows written so far durable, and their checksums in a file beside them.

        Args:
            number: of the checkpoint; the checksums of the one before stay until ``settle``.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.path):
            os.fsync(self._fd)
        content = self._sums[: self._blocks()].tobytes()
        path = self.path.with_suffix(f".{number}.sums")
        self._sums_files.append(path)
        write_bytes(path, content)
        return FileEntry(path.name, xxhash.xxh3_128_hexdigest(content), len(content))

    def settle(self) -> None:
        """Remove the checksums of all checkpoints but the newest."""
        *old, newest = self._sums_files
        for path in old:
            with storage_errors(path):
                path.unlink(missing_ok=True)
        self._sums_files = [newest]

    def reopen(self, written: int, sums: FileEntry) -> LatentFile:
        """Open and verify a file of a checkpoint that holds ``written`` rows.

        Raises:
            CorruptError: it does not hold what was saved.
            StorageError: it is missing or unreadable.
        """
        path, self.written = self.path.with_name(sums.name), written
        if sums.size != 8 * self._blocks():
            raise CorruptError(f"{path}: the checksums of {self.path.name} are damaged themselves")
        verify(path, sums.checksum, sums.size)
        with storage_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
            found = os.fstat(self._descriptor).st_size
            content = path.read_bytes()
        self._sums_files = [path]
        if found != self.size:
            raise CorruptError(f"{self.path}: holds {found} bytes, expected {self.size}")
        self._sums[: self._blocks()] = np.frombuffer(content, np.uint64)
        try:
            self._verify(np.arange(self._blocks()))
        except DamagedLatentsError as error:
            raise CorruptError(
                f"{error}; they belong to the newest checkpoint, and no cell can emit them again"
            ) from None
        if written % self._block:
            self._running.update(self._rows_of(self._blocks() - 1))
        return self

    def restart(self, path: Path, first: int) -> None:
        """Give the open file another name, to be written anew from row number ``first`` on."""
        with storage_errors(self.path):
            self.path.rename(path)
        self._remove_sums()
        self.path, self.first, self.written = path, first, 0
        self._sums[:], self._verified[:] = 0, False

    def write(self, first: int, encoded: torch.Tensor) -> int:
        """Write encoded rows [B, row_bytes] from row number ``first`` on; returns the bytes written.

        Raises:
            ValueError: ``first`` is not the row behind the last.
            StorageError: the disk refused.
        """
        if first - self.first != self.written:
            raise ValueError(f"{self.path}: row {first} written after {self.written} rows from {self.first} on")
        rows = encoded.numpy()
        with storage_errors(self.path):
            left = rows.data.cast("B")
            offset = self.written * self.format.row_bytes
            while left:
                done = os.pwrite(self._fd, left, offset)
                left, offset = left[done:], offset + done
        self._add_sums(rows)
        return encoded.numel()

    def digest(self) -> str:
        """The checksum of all rows, in hex."""
        return xxhash.xxh3_64_hexdigest(self._sums.tobytes())

    def distrust(self) -> None:
        """Verify every block again when it is next read."""
        self._verified[:] = False

    def read(self, rows: Rows, out: torch.Tensor) -> None:
        """Copy rows, a slice or an int64 index array [B], into ``out`` [B, row_bytes], uint8.

        Raises:
            DamagedLatentsError: a block does not hold what was written to it.
            StorageError: the medium failed or the file ended early.
        """
        target = out.numpy()
        if isinstance(rows, slice):
            start, stop = rows.start - self.first, rows.stop - self.first
            self._verify(np.arange(start // self._block, -(-stop // self._block)))
            self._read_run(start, target)
        else:
            self._verify(rows // self._block)
            self._gather(rows, target)

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
        self._remove_sums()

    def _remove_sums(self) -> None:
        for path in self._sums_files:
            with storage_errors(path):
                path.unlink(missing_ok=True)
        self._sums_files.clear()

    def _blocks(self) -> int:
        """How many blocks have rows, the last maybe not all of them."""
        return -(-self.written // self._block)

    def _add_sums(self, rows: NDArray[np.uint8]) -> None:
        while len(rows):
            block, begun = divmod(self.written, self._block)
            if begun == 0:
                self._running.reset()
            count = min(self._block - begun, len(rows))
            self._running.update(rows[:count].data)
            self._sums[block], self._verified[block] = self._running.intdigest(), False
            self.written += count
            rows = rows[count:]

    def _verify(self, blocks: NDArray[np.int64]) -> None:
        for block in np.unique(blocks[~self._verified[blocks]]).tolist():
            if xxhash.xxh3_64_intdigest(self._rows_of(block)) != self._sums[block]:
                first = block * self._block
                last = min(first + self._block, self.written) - 1
                raise DamagedLatentsError(
                    f"{self.path}: rows {first} to {last} are not as they were written; the disk or the memory of this"
                    " machine may be failing"
                )
            self._verified[block] = True

    def _rows_of(self, block: int) -> memoryview:
        first = block * self._block
        rows = np.empty((min(self._block, self.written - first), self.format.row_bytes), np.uint8)
        self._read_run(first, rows)
        return rows.data

    @property
    def _fd(self) -> int:
        if self._descriptor is None:
            raise StorageError(f"{self.path}: read or written after it was closed")
        return self._descriptor

    def _read_run(self, first: int, target: NDArray[np.uint8]) -> None:
        left = target.data.cast("B")
        offset = first * self.format.row_bytes
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
