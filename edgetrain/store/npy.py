"""A ``.npy`` file written a few rows at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.store.atomic import replacing, reserve

_ITEM = np.dtype("<f4")


@contextmanager
def writing_npy(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[int, NDArray[np.float32]], None]]:
    """Write a float32 array of ``shape`` [rows, ...] to ``path``, atomically and durably.

    Yields a function that takes the number of a block's first row and the block [n, ...]. Space is allocated
    first. Unless the body succeeds, ``path`` stays as it was.

    Raises:
        StorageError: the disk refused.
    """
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(_ITEM), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    start, row_bytes = len(header.getvalue()), _ITEM.itemsize * prod(shape[1:])
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        reserve(file.fileno(), start + shape[0] * row_bytes)
        _write(file.fileno(), 0, memoryview(header.getvalue()))

        def put(first: int, rows: NDArray[np.float32]) -> None:
            content = np.ascontiguousarray(rows, _ITEM)
            _write(file.fileno(), start + first * row_bytes, content.reshape(-1).data.cast("B"))

        yield put


def _write(descriptor: int, offset: int, left: memoryview) -> None:
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done
