"""The official binary rows of CIFAR-10 and CIFAR-100.

A row is its label, then 1,024 red, 1,024 green and 1,024 blue bytes, each plane row by row. CIFAR-10
has one label byte; CIFAR-100 has the coarse label, which is not used, and then the fine one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.chunks import byte_rows
from edgetrain.data.compressed import check_plain_size, open_stream
from edgetrain.data.labels import check_range

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarRows:
    """How rows lie in a file.

    Attributes:
        label_bytes: before the pixels; the last of them is the label.
        classes: labels are below it.
    """

    label_bytes: int
    classes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.label_bytes + PIXELS


@dataclass(frozen=True)
class CifarFiles:
    """The files of one part, in order, each plain, ``.gz`` or ``.xz`` and each of ``rows`` rows."""

    paths: Sequence[Path]
    rows: int


def open_cifar(
    name: str, train: CifarFiles, test: CifarFiles, layout: CifarRows, class_names: tuple[str, ...] = ()
) -> DataSet:
    """The data set of official binary files; reads nothing but the sizes of plain files.

    Raises:
        CorruptError: a plain file is too short or too long; compressed ones tell when they are read.
        StorageError: a file is unreadable.
    """
    parts = [_part(files, layout) for files in (train, test)]
    return DataSet(name, SHAPE, 255.0, "image", layout.classes, parts[0], parts[1], class_names)


def _part(files: CifarFiles, layout: CifarRows) -> Part:
    for path in files.paths:
        check_plain_size(path, files.rows * layout.row_bytes)
    where = ", ".join(str(path) for path in files.paths)
    return Part(files.rows * len(files.paths), partial(_chunks, files, layout), where)


def _chunks(files: CifarFiles, layout: CifarRows) -> Iterator[Chunk]:
    """Images [n, 3, 32, 32], uint8, with their labels [n]."""
    for path in files.paths:
        yield from _file_chunks(path, files.rows, layout)


def _file_chunks(path: Path, rows: int, layout: CifarRows) -> Iterator[Chunk]:
    first = 0
    with open_stream(path) as stream:
        for block in byte_rows(stream, rows, layout.row_bytes, str(path)):
            labels = block[:, layout.label_bytes - 1].astype(np.int64)
            check_range(labels, layout.classes, str(path), first)
            first += len(block)
            yield np.ascontiguousarray(block[:, layout.label_bytes :]).reshape(-1, *SHAPE), labels
