"""From a reader's chunks to latent store 0: the prepared inputs on disk, written out of core.

Images go down as the bytes they are (a value is byte / pixel_max), token ids as int32; everything else
as float32, a table's columns scaled on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.chunks import rows_per_chunk
from edgetrain.data.layout import check_finite, check_ids, check_pixels
from edgetrain.errors import CorruptError, EdgetrainError
from edgetrain.store.atomic import storage_errors
from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import Normalization, RowFormat

_FLOAT32_MAX, _FLOAT64_MAX = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)
_SQUARABLE = 2.0**-500, 2.0**500  # magnitudes whose squares stay within float64
_MOST_TERMS = 1000  # rounding errors of longer sums are not counted as noise


@dataclass(frozen=True)
class Scaling:
    """Brings columns, or a signal's channels, to a common scale: value = (raw - shift - rest) * scale in float64.

    Attributes:
        shift: float64 [features], or [channels, 1] for signals.
        scale: likewise.
        clip: whether values are then kept within 0..1: ``unit`` scaling promises that range also for
            rows that go beyond the training rows.
        rest: likewise, the rounding error of ``shift``, which counts for integers beyond 2**53.
    """

    shift: NDArray[np.float64]
    scale: NDArray[np.float64]
    clip: bool = False
    rest: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    def apply(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """Scaled rows [n, features], float32, of rows of any real dtype."""
        scaled = np.empty(raw.shape, np.float32)
        least, most = (0.0, 1.0) if self.clip else (-_FLOAT32_MAX, _FLOAT32_MAX)
        for part in _parts(raw):
            values = (_widened(raw[part]) - self.shift - self.rest) * self.scale
            scaled[part] = np.clip(values, least, most)
        return scaled


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


@dataclass(frozen=True)
class Statistics:
    """What was measured of the training rows, or stated, to prepare all rows alike.

    Attributes:
        scaling: of tables, signals and some floating-point images.
        normalization: of images.
    """

    scaling: Scaling | None = None
    normalization: Normalization | None = None


def measure_scaling(part: Part, kind: Literal["standard", "unit"]) -> Scaling:
    """The scaling of a table's columns or a signal's channels, measured on the training rows in one pass.

    ``standard`` gives mean 0 and (population) deviation 1; ``unit`` brings the least..greatest value
    to 0..1 and clips rows beyond that. A constant column becomes 0 (its scale is 1), and so does one whose
    deviation is only rounding error.

    Raises:
        InputError: a value is not finite.
    """
    moments, trailing = _Moments(), 0
    for values, _ in _checked_chunks(part):
        trailing = values.ndim - 2
        for rows in _parts(values):
            moments.add(np.moveaxis(values[rows], 1, -1).reshape(-1, values.shape[1]))
    constant = moments.constant
    if kind == "unit":
        base, offset, spread = moments.least, np.zeros(1), moments.greatest - moments.least
    else:
        base, offset, spread = moments.origin, np.where(constant, 0, moments.centred), moments.deviation
    shift = (base + offset).astype(np.float64)
    rest = base - shift + offset
    scale = np.minimum(1 / np.where(constant, 1, spread), _FLOAT64_MAX)
    shift, scale, rest = (term.astype(np.float64).reshape(-1, *[1] * trailing) for term in (shift, scale, rest))
    return Scaling(shift, scale, kind == "unit", rest)


def scaling_beyond_unit(part: Part) -> Scaling | None:
    """One scaling of all values from their least..greatest to 0..1; ``None`` if they are within 0..1.

    Raises:
        InputError: a value is not finite.
    """
    least, greatest = np.inf, -np.inf
    for values, _ in _checked_chunks(part):
        least, greatest = min(least, float(values.min())), max(greatest, float(values.max()))
    if least >= 0 and greatest <= 1:
        return None
    spread = greatest - least
    return Scaling(np.array([least]), np.array([1 / spread if spread else 1.0]), clip=True)


def measure_normalization(data: DataSet, part: Part) -> Normalization:
    """Mean and (population) deviation of each channel of images, as decoded; 1 where a channel is constant.

    Raises:
        InputError: a value is not finite.
    """
    moments, channels = _Moments(), data.shape[0] if len(data.shape) == 3 else 1
    for values, _ in _checked_chunks(part):
        for rows in _parts(values):
            taken = np.moveaxis(values[rows], 1, -1) if channels > 1 else values[rows]
            moments.add(taken.reshape(-1, channels))
    greatest = data.pixel_max or 1.0
    mean = (moments.origin + moments.centred) / greatest
    std = np.where(moments.constant, 1.0, moments.deviation / greatest)
    return Normalization(tuple(map(float, mean)), tuple(map(float, std)))


def prepare(data: DataSet, part: Part, folder: Path, name: str, statistics: Statistics = Statistics()) -> Prepared:
    """Write a part's rows to ``folder/<name>.x.rows`` and its labels to ``folder/<name>.y.rows``.

    uint8 chunks go down as ``pixels``, token ids as ``tokens``, others as float32. Takes the memory of a
    few chunks, whatever the number of rows. On any error both files are removed.

    Args:
        data: what the part belongs to.
        part: its training or its test rows.
        folder: made if it is missing.
        name: begins the files' names.
        statistics: scaling is applied to what is written, normalisation to what is read; by default, rows stay as they
            are.

    Raises:
        InputError: the part holds what no row may hold.
        CorruptError: a file that is read is damaged.
        StorageError: the disk is full, read-only, or failed.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    x = LatentFile(
        folder / f"{name}.x.rows", part.rows, replace(_input_format(data), normalization=statistics.normalization)
    )
    y = LatentFile(folder / f"{name}.y.rows", part.rows, RowFormat((), "int64"))
    try:
        labelled = _write_rows(_with_checks(data, part), x.allocate(), y, statistics.scaling)
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


def _with_checks(data: DataSet, part: Part) -> Part:
    """The part, checked on the way: an id beyond the vocabulary would end a run on a GPU without a word."""
    if data.vocabulary is not None:
        return replace(part, chunks=partial(_checked, part, check_ids, data.vocabulary))
    if data.pixel_max is not None:
        return replace(part, chunks=partial(_checked, part, check_pixels, data.pixel_max))
    return part


def _checked(part: Part, check: Callable[[NDArray[Any], Any, int, str], None], limit: float) -> Iterator[Chunk]:
    first = 0
    for values, labels in part.chunks():
        check(values, limit, first, part.where)
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


def _parts(values: NDArray[Any]) -> Iterator[slice]:
    """Ranges of rows that take a few MiB in float64."""
    step = rows_per_chunk(8 * prod(values.shape[1:]), "rows")
    return (slice(first, first + step) for first in range(0, len(values), step))


def _widened(values: NDArray[Any]) -> NDArray[Any]:
    """Rows [n, features] in float64, or in long doubles where float64 would round integers or squares overflow."""
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        return values.astype(np.longdouble)
    wide = values.astype(np.float64, copy=False)
    magnitude = np.abs(wide).max(axis=0)
    least, most = _SQUARABLE
    extreme = (magnitude > most) | ((magnitude < least) & (magnitude > 0))
    return wide.astype(np.longdouble) if extreme.any() else wide


class _Moments:
    """Mean, squared deviations and range of columns, chunk by chunk (Chan, Golub and LeVeque, 1979).

    Values are centred on the first row, so that a mean that is large beside the deviation costs no digits.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.exact = True  # only integers so far
        self.origin: NDArray[Any] = np.zeros(1)
        self.centred: NDArray[Any] = np.zeros(1)  # mean of values - origin
        self.squares: NDArray[Any] = np.zeros(1)
        self.least: NDArray[Any] = np.full(1, np.inf)
        self.greatest: NDArray[Any] = np.full(1, -np.inf)

    def add(self, raw: NDArray[Any]) -> None:
        """Take in rows [n, features]."""
        values = _widened(raw)
        if not self.rows:
            self.origin = values[0]
        self.exact = self.exact and raw.dtype.kind in "biu"
        self.least = np.minimum(self.least, values.min(axis=0))
        self.greatest = np.maximum(self.greatest, values.max(axis=0))
        rows = self.rows + len(values)
        values = values - self.origin
        mean = values.mean(axis=0)
        gap = mean - self.centred
        squares = np.square(values - mean).sum(axis=0)
        self.squares = self.squares + squares + gap**2 * (self.rows * len(values) / rows)
        self.centred = self.centred + gap * (len(values) / rows)
        self.rows = rows

    @property
    def deviation(self) -> NDArray[Any]:
        """The population's standard deviation of each column, [features]."""
        return np.asarray(np.sqrt(self.squares / max(self.rows, 1)))

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which columns do not vary, or by no more than rounding (scikit-learn's bound for ``StandardScaler``)."""
        same: NDArray[np.bool_] = self.least == self.greatest
        mean = np.abs(self.origin + self.centred)
        noise = min(self.rows, _MOST_TERMS) * np.finfo(np.float64).eps * mean
        return same if self.exact else same | (self.deviation <= noise)
