"""What an input array means, read off its dtype and dims: pixels, float images or a table.

======  =====================  =============  ==================================
dtype   dims                   sample         meaning
======  =====================  =============  ==================================
uint8   [N, F]                 (F,)           pixels, byte / 255
uint8   [N, H, W]              (1, H, W)      pixels
uint8   [N, H, W, C]           (C, H, W)      pixels, C is 1 or 3
uint8   [N, C, H, W]           (C, H, W)      pixels
float   3 or 4, as above       as above       images whose values are used as they are
float   [N, F]                 (F,)           a table: columns to be scaled
wider   [N, F]                 (F,)           a table
int
======  =====================  =============  ==================================

Legend: N rows, F features, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How raw rows become samples.

    Attributes:
        shape: of one sample.
        pixel_max: 255 for uint8 rows, otherwise ``None``.
        table: whether the columns are measurements.
        channels_last: whether raw rows are [H, W, C].
    """

    shape: tuple[int, ...]
    pixel_max: float | None
    table: bool
    channels_last: bool

    def arrange(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Raw rows [n, ...] as samples [n, *shape]: uint8 pixels, float32 images; tables keep their dtype."""
        if self.channels_last:
            raw = raw.transpose(0, 3, 1, 2)  # [n, H, W, C] -> [n, C, H, W]
        with np.errstate(over="ignore"):  # too large for the narrower dtype becomes infinity, which is refused
            if self.table:
                raw = raw.astype(np.float64 if raw.dtype.itemsize > 8 else raw.dtype.newbyteorder("="), copy=False)
            elif self.pixel_max is None:
                raw = raw.astype(np.float32, copy=False)
        return np.ascontiguousarray(raw).reshape(len(raw), *self.shape)


def layout_of(dtype: np.dtype[Any], dims: tuple[int, ...], where: str) -> Layout:
    """The layout of an input array of this dtype and these dims, rows first.

    Raises:
        InputError: the array is empty, or its dtype or dims are none that rows can have.
    """
    if 0 in dims:
        raise InputError(f"{where}: the array is empty, its shape is {list(dims)}")
    if not 2 <= len(dims) <= 4:
        raise InputError(f"{where}: shape {list(dims)}, expected [N, F], [N, H, W] or [N, C, H, W]")
    _check_dtype(dtype, len(dims), where)
    pixel_max = 255.0 if dtype == np.uint8 else None
    if len(dims) == 2:
        return Layout(dims[1:], pixel_max, pixel_max is None, channels_last=False)
    if len(dims) == 3:
        return Layout((1, *dims[1:]), pixel_max, table=False, channels_last=False)
    if _channels_last(dims):
        return Layout((dims[3], dims[1], dims[2]), pixel_max, table=False, channels_last=True)
    return Layout(dims[1:], pixel_max, table=False, channels_last=False)


def check_finite(values: NDArray[Any], first: int, where: str) -> None:
    """Look for NaN and infinity in samples [n, ...]; ``first`` is the row of the first one.

    Raises:
        InputError: a value is not finite.
    """
    if values.dtype == np.uint8 or np.isfinite(values).all():
        return
    flat = values.reshape(len(values), -1)
    row = int(np.flatnonzero(~np.isfinite(flat).all(axis=1))[0])
    column = int(np.flatnonzero(~np.isfinite(flat[row]))[0])
    raise InputError(
        f"{where}: row {first + row} holds {flat[row, column]} at position {column}, expected numbers "
        f"that are finite in {values.dtype}; remove or fill such rows"
    )


def check_ids(values: NDArray[Any], vocabulary: int, first: int, where: str) -> None:
    """Look for what is no token id in rows [n, length]; ``first`` is the row of the first one.

    Raises:
        InputError: values are no int32 or int64, or one is not in 0..vocabulary-1.
    """
    if values.dtype not in (np.int32, np.int64):
        raise InputError(f"{where}: token ids are {values.dtype}, expected int32 or int64; convert with .astype")
    wrong = np.argwhere((values < 0) | (values >= vocabulary))
    if len(wrong):
        row, column = int(wrong[0][0]), int(wrong[0][1])
        raise InputError(
            f"{where}: row {first + row} holds id {values[row, column]} at position {column}, expected "
            f"0..{vocabulary - 1} ({vocabulary} ids); look words up in the vocabulary of the training rows"
        )


def _check_dtype(dtype: np.dtype[Any], count: int, where: str) -> None:
    if dtype.kind not in "biuf":
        raise InputError(f"{where}: dtype {dtype}, expected uint8 pixels or numbers (float or int)")
    if count > 2 and dtype.kind in "biu" and dtype != np.uint8:
        raise InputError(
            f"{where}: {dtype} images, expected uint8 (pixels 0..255) or float (values as they are); "
            "convert with .astype"
        )


def _channels_last(dims: tuple[int, ...]) -> bool:
    """Whether [N, a, b, c] ends in channels; 1x1 and 3x3 maps, [N, C, 3, 3], begin with them."""
    return dims[3] in (1, 3) and dims[2] != dims[3]
