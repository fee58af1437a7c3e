"""IDX, the layout of MNIST and Fashion-MNIST: a file of images and a file of labels.

Images: magic 0x00000803, then count, height and width as big-endian 32-bit words, then the pixels,
one byte each. Labels: magic 0x00000801, the count, then one byte for each image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.chunks import ByteStream, byte_rows, rows_per_chunk
from edgetrain.data.compressed import check_plain_size, open_stream
from edgetrain.data.labels import check_label_count, check_range
from edgetrain.errors import CorruptError, InputError

_IMAGES, _LABELS = 0x00000803, 0x00000801


@dataclass(frozen=True)
class IdxPair:
    """A file of images and the file of their labels, each plain, ``.gz`` or ``.xz``."""

    images: Path
    labels: Path


def open_idx(name: str, train: IdxPair, test: IdxPair, classes: int, class_names: tuple[str, ...] = ()) -> DataSet:
    """The data set of two pairs of IDX files; reads the headers and the labels, no pixels.

    Raises:
        InputError: a pair does not belong together, a label is out of range, or a file holds no rows.
        CorruptError: a file is no IDX file, or too short or too long for its header.
        StorageError: a file is unreadable.
    """
    (train_part, shape), (test_part, test_shape) = _open_pair(train, classes), _open_pair(test, classes)
    if test_shape != shape:
        raise InputError(f"{test.images}: images are {test_shape[1:]}, those of {train.images} are {shape[1:]}")
    return DataSet(name, shape, 255.0, "image", classes, train_part, test_part, class_names)


def _open_pair(pair: IdxPair, classes: int) -> tuple[Part, tuple[int, int, int]]:
    count, height, width = _read_header(pair.images, _IMAGES, 3)
    (labels_count,) = _read_header(pair.labels, _LABELS, 1)
    if labels_count != count:
        raise InputError(f"{pair.labels}: {labels_count} labels, but {pair.images} has {count} images")
    if count * height * width == 0:
        raise InputError(f"{pair.images}: holds {count} images of {height}x{width}, expected at least one pixel")
    check_label_count(count, str(pair.labels))
    rows_per_chunk(height * width, str(pair.images))  # refuses a size that only a damaged header has
    check_plain_size(pair.images, 16 + count * height * width)
    labels = _read_labels(pair.labels, count)
    check_range(labels, classes, str(pair.labels))
    chunks = partial(_chunks, pair.images, labels, height, width)
    return Part(count, chunks, str(pair.images)), (1, height, width)


def _read_header(path: Path, magic: int, dims: int) -> tuple[int, ...]:
    with open_stream(path) as stream:
        return _take_header(stream, path, magic, dims)


def _take_header(stream: ByteStream, path: Path, magic: int, dims: int) -> tuple[int, ...]:
    """Read magic and dims off the beginning of ``stream``; the data follow."""
    header = stream.read(4 + 4 * dims)
    if len(header) < 4 + 4 * dims:
        raise CorruptError(f"{path}: ends inside its header, after {len(header)} bytes; replace the file")
    found, *sizes = struct.unpack(f">{1 + dims}I", header)
    if found != magic:
        kind = "images" if magic == _IMAGES else "labels"
        raise CorruptError(f"{path}: begins with 0x{found:08x}, expected 0x{magic:08x} (IDX {kind}); replace the file")
    return tuple(sizes)


def _read_labels(path: Path, count: int) -> NDArray[np.int64]:
    check_plain_size(path, 8 + count)
    with open_stream(path) as stream:
        _take_header(stream, path, _LABELS, 1)
        blocks = list(byte_rows(stream, count, 1, str(path)))
    return np.concatenate(blocks).reshape(-1).astype(np.int64)


def _chunks(images: Path, labels: NDArray[np.int64], height: int, width: int) -> Iterator[Chunk]:
    """Images [n, 1, height, width], uint8, with their labels [n]."""
    first = 0
    with open_stream(images) as stream:
        _take_header(stream, images, _IMAGES, 3)
        for block in byte_rows(stream, len(labels), height * width, str(images)):
            yield block.reshape(-1, 1, height, width), labels[first : first + len(block)]
            first += len(block)
