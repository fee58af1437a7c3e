"""Rows of a fixed size off a byte stream, a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import CorruptError, InputError

CHUNK_BYTES = 4 << 20
MAX_ROW_BYTES = 256 << 20  # one row is held whole, so a header must not be able to ask for any size


class ByteStream(Protocol):
    """What a row reader needs of an open file, plain or compressed."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""
        ...

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the buffer as far as it goes; 0 at the end."""
        ...


def rows_per_chunk(row_bytes: int, where: str) -> int:
    """How many rows make a chunk of a few MiB; at least one.

    Raises:
        InputError: a single row is beyond what is held at once.
    """
    if row_bytes > MAX_ROW_BYTES:
        raise InputError(f"{where}: one row takes {row_bytes} bytes, expected at most {MAX_ROW_BYTES}")
    return max(1, CHUNK_BYTES // row_bytes)


def byte_rows(stream: ByteStream, rows: int, row_bytes: int, where: str) -> Iterator[NDArray[np.uint8]]:
    """Chunks [n, row_bytes], uint8, each in memory of its own; together ``rows`` rows.

    Raises:
        CorruptError: the stream ends before the last row or continues after it.
        InputError: a row is too large.
    """
    step = rows_per_chunk(row_bytes, where)
    for first in range(0, rows, step):
        block = np.empty((min(step, rows - first), row_bytes), np.uint8)
        filled = _fill(stream, block.data.cast("B"))
        if filled < block.nbytes:
            raise CorruptError(
                f"{where}: truncated: ends after {first * row_bytes + filled} bytes of rows, "
                f"expected {rows * row_bytes} ({rows} rows of {row_bytes}); replace the file"
            )
        yield block
    if stream.read(1):
        raise CorruptError(
            f"{where}: has trailing bytes, expected {rows} rows of {row_bytes} bytes and no more; replace the file"
        )


def _fill(stream: ByteStream, buffer: memoryview) -> int:
    """Read until the buffer is full or the stream ends; returns the bytes read."""
    done = 0
    while done < len(buffer):
        # Small steps: a stream that ends early then never costs the memory of the whole buffer.
        count = stream.readinto(buffer[done : done + (1 << 20)])
        if not count:
            break
        done += count
    return done
