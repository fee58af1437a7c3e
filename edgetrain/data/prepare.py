"""From a reader's chunks to latent store 0: the prepared inputs on disk, written out of core.

Images go down as the bytes they are (a value is byte / pixel_max), token ids as int32; everything else
as float32, a table's columns scaled on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.layout import check_finite, check_ids
from edgetrain.errors import CorruptError, EdgetrainError
from edgetrain.store.atomic import storage_errors
from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import RowFormat

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Scaling:
    """How a table's columns are brought to a common scale: value = (raw - shift) * scale.

    Attributes:
        shift: float32 [features].
        scale: float32 [features].
        clip: whether values are then kept within 0..1: ``unit`` scaling promises that range also for
            rows that go beyond the training rows.
    """

    shift: NDArray[np.float32]
    scale: NDArray[np.float32]
    clip: bool = False

    def apply(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Scaled rows [n, features], float32."""
        values = (raw.astype(np.float64) - self.shift) * self.scale
        least, most = (0.0, 1.0) if self.clip else (-_FLOAT32_MAX, _FLOAT32_MAX)
        return np.clip(values, least, most).astype(np.float32)


@dataclass(frozen=True)
class Prepared:
    """A part's rows in store 0, open for reading.

    Attributes:
        x: the inputs.
        y: the labels, int64; ``None`` where the part has none.
        written: bytes that went to disk.
    """

    x: LatentFile
    y: LatentFile | None
    written: int

    def close(self) -> None:
        """Close the files and leave them."""
        self.x.close()
        if self.y is not None:
            self.y.close()


def measure_scaling(part: Part, kind: Literal["standard", "unit"]) -> Scaling:
    """The scaling that the training rows of a table ask for, found in one pass in float64.

    ``standard`` gives mean 0 and (population) deviation 1, ``unit`` brings the least..greatest value
    to 0..1 and clips rows beyond that. A constant column becomes 0 (its scale is 1).

    Raises:
        InputError: a value is not finite.
    """
    moments = _Moments()
    for values, _ in _checked_chunks(part):
        moments.add(values.reshape(len(values), -1).astype(np.float64))
    constant = moments.least == moments.greatest
    if kind == "unit":
        shift, spread = moments.least, moments.greatest - moments.least
    else:
        shift, spread = np.where(constant, moments.least, moments.mean), moments.deviation
    scale = np.minimum(1.0 / np.where(constant, 1.0, spread), _FLOAT32_MAX)
    return Scaling(shift.astype(np.float32), scale.astype(np.float32), clip=kind == "unit")


def prepare(data: DataSet, part: Part, folder: Path, name: str, scaling: Scaling | None) -> Prepared:
    """Write a part's rows to ``folder/<name>.x.rows`` and its labels to ``folder/<name>.y.rows``.

    uint8 chunks go down as ``pixels``, token ids as ``tokens``, others as float32. Takes the memory of a
    few chunks, whatever the number of rows. On any error both files are removed.

    Args:
        data: what the part belongs to.
        part: its training or its test rows.
        folder: made if it is missing.
        name: begins the files' names.
        scaling: for tables; ``None``: rows as they are.

    Raises:
        InputError: the part holds what no row may hold.
        CorruptError: a file that is read is damaged.
        StorageError: the disk is full, read-only, or failed.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    x = LatentFile(folder / f"{name}.x.rows", part.rows, _input_format(data))
    y = LatentFile(folder / f"{name}.y.rows", part.rows, RowFormat((), "int64"))
    try:
        labelled = _write_rows(_known_ids(data, part), x.allocate(), y, scaling)
    except BaseException:
        for file in (x, y):
            with suppress(EdgetrainError):  # a disk that refuses even that must not hide the cause
                file.delete()
        raise
    return Prepared(x, y if labelled else None, x.size + (y.size if labelled else 0))


def _input_format(data: DataSet) -> RowFormat:
    if data.vocabulary is not None:
        return RowFormat(data.shape, "tokens")
    if data.pixel_max is None:
        return RowFormat(data.shape, "float32")
    return RowFormat(data.shape, "pixels", data.pixel_max)


def _known_ids(data: DataSet, part: Part) -> Part:
    """The part, its token ids checked on the way: one that is too large would end a run on a GPU without a word."""
    vocabulary = data.vocabulary
    return part if vocabulary is None else replace(part, chunks=partial(_checked_ids, part, vocabulary))


def _checked_ids(part: Part, vocabulary: int) -> Iterator[Chunk]:
    first = 0
    for values, labels in part.chunks():
        check_ids(values, vocabulary, first, part.where)
        first += len(values)
        yield values, labels


def _write_rows(part: Part, x: LatentFile, y: LatentFile, scaling: Scaling | None) -> bool:
    """Write every chunk; whether the part has labels (their file is only then made)."""
    first, labelled = 0, False
    for values, labels in _checked_chunks(part):
        x.write(first, x.format.encode(_tensor(values if scaling is None else scaling.apply(values))))
        if labels is not None:
            if not labelled:
                y.allocate()
                labelled = True
            y.write(first, y.format.encode(_tensor(labels)))
        first += len(values)
    return labelled


def _checked_chunks(part: Part) -> Iterator[Chunk]:
    """The part's chunks, as many rows as it says and all of them finite."""
    first = 0
    for values, labels in part.chunks():
        check_finite(values, first, part.where)
        first += len(values)
        if first > part.rows:
            break
        yield values, labels
    if first != part.rows:
        more = "more" if first > part.rows else f"only {first}"
        raise CorruptError(f"{part.where}: gives {more} rows, expected {part.rows}; replace the file")


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    # torch refuses to look at arrays that it may not write to, so those are copied.
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


class _Moments:
    """Mean, squared deviations and range of columns, chunk by chunk (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.rows = 0
        self.mean: NDArray[np.float64] = np.zeros(1)
        self.squares: NDArray[np.float64] = np.zeros(1)
        self.least: NDArray[np.float64] = np.full(1, np.inf)
        self.greatest: NDArray[np.float64] = np.full(1, -np.inf)

    def add(self, values: NDArray[np.float64]) -> None:
        """Take in rows [n, features]."""
        rows = self.rows + len(values)
        mean = values.mean(axis=0)
        gap = mean - self.mean
        squares = np.square(values - mean).sum(axis=0)
        self.squares = self.squares + squares + gap**2 * (self.rows * len(values) / rows)
        self.mean = self.mean + gap * (len(values) / rows)
        self.least = np.minimum(self.least, values.min(axis=0))
        self.greatest = np.maximum(self.greatest, values.max(axis=0))
        self.rows = rows

    @property
    def deviation(self) -> NDArray[np.float64]:
        """The population's standard deviation of each column, [features]."""
        return np.asarray(np.sqrt(self.squares / max(self.rows, 1)), np.float64)
