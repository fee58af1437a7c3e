r"""The ``.npy`` header, read without numpy's own reader: that one takes headers of any size into memory.

Layout: magic ``\x93NUMPY``, version (2 bytes), header length (2 bytes, from version 2 on 4), then a
Python literal ``{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}``.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from edgetrain.data.chunks import ByteStream
from edgetrain.errors import CorruptError, InputError, shown

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # numpy's own bound; the header of a plain array takes about 120 bytes
_PLAIN = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_LONG = re.compile(r"[<>|=]?f(12|16)")  # x86 and ARM mean different numbers by the same bytes


@dataclass(frozen=True)
class NpyHeader:
    """What stands before an array's bytes.

    Attributes:
        dtype: a plain number type.
        dims: of the array.
        header_bytes: where the data begins.
    """

    dtype: np.dtype[Any]
    dims: tuple[int, ...]
    header_bytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes of the array's data."""
        return prod(self.dims) * self.dtype.itemsize


def read_npy_header(stream: ByteStream, where: str) -> NpyHeader:
    """Read the header off the beginning of ``stream``, up to where the data begins.

    Raises:
        CorruptError: this is no ``.npy`` header.
        InputError: the array is none that is read here: objects, records, Fortran order.
    """
    start = _exactly(stream, 8, where)
    if start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        raise CorruptError(f"{where}: begins with {start[:8].hex()}, expected an array of numpy's .npy format")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(_exactly(stream, width, where), "little")
    if length > _MAX_HEADER:
        raise CorruptError(f"{where}: its header takes {length} bytes, expected at most {_MAX_HEADER}")
    fields = _literal(_exactly(stream, length, where), where)
    return NpyHeader(_dtype(fields["descr"], where), _dims(fields, where), 8 + width + length)


def _exactly(stream: ByteStream, size: int, where: str) -> bytes:
    found = b""
    while len(found) < size and (block := stream.read(size - len(found))):
        found += block
    if len(found) < size:
        raise CorruptError(f"{where}: ends inside the array's header; write the file again")
    return found


def _literal(header: bytes, where: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in a damaged header
            fields = ast.literal_eval(header.decode("utf-8").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise CorruptError(f"{where}: its header cannot be read; write the file again") from error
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise CorruptError(f"{where}: its header is not that of a .npy array; write the file again")
    return fields


def _dtype(descr: object, where: str) -> np.dtype[Any]:
    if isinstance(descr, str) and _PLAIN.fullmatch(descr):
        return np.dtype(descr)
    if isinstance(descr, str) and _LONG.fullmatch(descr):
        raise InputError(f"{where}: long doubles, which differ between machines; convert with .astype(np.float64)")
    if isinstance(descr, str) and "O" in descr:
        raise InputError(f"{where}: holds Python objects, which need pickle and are never read; save numbers")
    raise InputError(f"{where}: dtype {shown(descr)}, expected plain numbers (uint8, int or float)")


def _dims(fields: dict[str, Any], where: str) -> tuple[int, ...]:
    dims = fields["shape"]
    if not isinstance(dims, tuple) or not all(type(n) is int and 0 <= n < 1 << 48 for n in dims):
        raise CorruptError(f"{where}: shape {shown(dims)} in its header, expected whole numbers")
    if len(dims) > 32:
        raise CorruptError(f"{where}: {len(dims)} dimensions in its header, expected at most 4")
    if fields["fortran_order"] is not False and len(dims) > 1:
        raise InputError(f"{where}: is in Fortran order, expected rows one by one; save np.ascontiguousarray of it")
    return dims
