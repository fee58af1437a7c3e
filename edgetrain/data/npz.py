"""An ``.npz`` file whose rows stream out of the archive, stored or deflated: never whole, never pickle.

Members are ``x_train y_train x_test y_test``, the test pair optional, or ``x y``, of which a
stratified fifth, always the same, becomes the test part.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import DataSet
from edgetrain.data.chunks import ByteStream, byte_rows
from edgetrain.data.labels import check_label_dims
from edgetrain.data.layout import AS_FOUND, Reading, layout_of
from edgetrain.data.npy import NpyHeader, read_npy_header
from edgetrain.data.sources import Labelled, rows_alone, split_drawn, train_and_test
from edgetrain.errors import CorruptError, InputError
from edgetrain.store.atomic import storage_errors

_DEFLATE_MOST = 1040  # deflate cannot shrink further than 1032:1; a directory that says so is wrong
_EXPECTED = "expected x_train, y_train, x_test, y_test, or x, y"


def open_npz(path: Path, reading: Reading = AS_FOUND) -> DataSet:
    """The data set in the file; the rows stay there until they are read.

    Raises:
        InputError: the file does not exist, or it holds no data set.
        CorruptError: the file is damaged.
        StorageError: the file is unreadable.
    """
    names = _member_names(path)
    if {"x_train", "y_train"} <= names:
        test = _labelled(path, "x_test", "y_test", reading) if {"x_test", "y_test"} <= names else None
        if test is None and names & {"x_test", "y_test"}:
            raise InputError(f"{path}: holds only one of x_test and y_test; {_EXPECTED}")
        return train_and_test(path.stem, _labelled(path, "x_train", "y_train", reading), test, reading)
    if {"x", "y"} <= names:
        return split_drawn(path.stem, _labelled(path, "x", "y", reading), reading)
    raise InputError(f"{path}: holds {_listed(names)}; {_EXPECTED}")


def open_npz_rows(path: Path, reading: Reading = AS_FOUND) -> DataSet:
    """The rows to predict on, ``x`` or else ``x_test``, as the test part; their labels are optional.

    Raises:
        InputError: the file does not exist, or it holds no rows.
        CorruptError: the file is damaged.
        StorageError: the file is unreadable.
    """
    names = _member_names(path)
    for inputs, labels in (("x", "y"), ("x_test", "y_test")):
        if inputs in names:
            source = _open_member(path, inputs)
            found = _read_labels(path, labels, source, reading) if labels in names else None
            return rows_alone(path.stem, source, found, f"{path}: {labels}", reading, whole=inputs == "x")
    raise InputError(f"{path}: holds {_listed(names)}; expected x or x_test")


@dataclass(frozen=True)
class _NpzSource:
    path: Path
    member: str
    header: NpyHeader

    @property
    def where(self) -> str:
        return f"{self.path}: {self.member}"

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.header.dtype

    @property
    def dims(self) -> tuple[int, ...]:
        return self.header.dims

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Rows [n, *dims[1:]] as they come out of the archive."""
        row_bytes = prod(self.dims[1:]) * self.dtype.itemsize
        with _member_stream(self.path, self.member) as stream:
            read_npy_header(stream, self.where)
            for block in byte_rows(stream, self.dims[0], row_bytes, self.where):
                yield block.reshape(-1).view(self.dtype).reshape(len(block), *self.dims[1:])


def _labelled(path: Path, inputs: str, labels: str, reading: Reading) -> Labelled:
    source = _open_member(path, inputs)
    return Labelled(source, _read_labels(path, labels, source, reading), f"{path}: {labels}")


def _read_labels(path: Path, member: str, inputs: _NpzSource, reading: Reading) -> NDArray[Any]:
    """The label member [N] or [N, 1], whole: 8 bytes a row at most."""
    layout_of(inputs.dtype, inputs.dims, inputs.where, reading)  # refuses inputs without rows
    source = _open_member(path, member)
    check_label_dims(source.dims, inputs.dims[0], source.where)
    return np.concatenate(list(source.blocks()))


def _member_names(path: Path) -> set[str]:
    with storage_errors(path):
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected an .npz file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; {_EXPECTED}")
    with _zip_errors(path), zipfile.ZipFile(path) as archive:
        return {name[:-4] for name in archive.namelist() if name.endswith(".npy")}


def _open_member(path: Path, member: str) -> _NpzSource:
    """Read the member's header and hold it against what the archive's directory says."""
    with _zip_errors(path), zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{member}.npy")
    _check_entry(entry, path)
    with _member_stream(path, member) as stream:
        header = read_npy_header(stream, f"{path}: {member}")
    if header.header_bytes + header.data_bytes != entry.file_size:
        raise CorruptError(
            f"{path}: {member} holds {entry.file_size - header.header_bytes} bytes of data, expected "
            f"{header.data_bytes} for shape {list(header.dims)} of {header.dtype}; write the file again"
        )
    return _NpzSource(path, member, header)


@contextmanager
def _member_stream(path: Path, member: str) -> Iterator[ByteStream]:
    with _zip_errors(path), zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as stream:
        yield cast(ByteStream, stream)


def _check_entry(entry: zipfile.ZipInfo, path: Path) -> None:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {entry.filename} is neither stored nor deflated; write it with np.savez")
    most = entry.compress_size * (_DEFLATE_MOST if entry.compress_type else 1) + 64
    if entry.compress_size > path.stat().st_size or entry.file_size > most:
        raise CorruptError(f"{path}: its directory gives {entry.filename} an impossible size; write the file again")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:8]) or "no arrays"


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Name the file in whatever a damaged archive makes zipfile raise.

    RuntimeError stands for encryption, NotImplementedError for odd features, the other three for
    fields out of range.
    """
    try:
        with storage_errors(path):
            yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
        raise CorruptError(f"{path}: damaged .npz archive ({_reason(error)}); write the file again") from error
    except (RuntimeError, ValueError, OverflowError, KeyError) as error:
        raise CorruptError(f"{path}: not a readable .npz archive ({_reason(error)}); write it with np.savez") from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
