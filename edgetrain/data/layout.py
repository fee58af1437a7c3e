"""What an input array means, read off its dtype and dims unless the user states it.

=======  ===============  =======================  ====================================================
input    dtype            dims                     sample, value
=======  ===============  =======================  ====================================================
image    uint8            [N, H, W]                (1, H, W), byte / 255
image    uint8            [N, H, W, C] or          (C, H, W), byte / 255
                          [N, C, H, W]
image    uint8            [N, F]                   (F,), byte / 255; only where it is stated
image    float            as for uint8             values as they are
table    any              [N, F]                   (F,), each column scaled
signal   any              [N, L]                   (1, L), scaled
signal   any              [N, C, L] or [N, L, C]   (C, L), each channel scaled over all positions
tokens   integers         [N, L]                   (L,), ids as they are
=======  ===============  =======================  ====================================================

Unless it is stated, 2 dims are a table, 3 and 4 are images, and signals have their channels first.

Legend: N rows, F features, C channels, H height, W width, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import InputError

Input = Literal["image", "table", "tokens", "signal"]
Channels = Literal["first", "last"]

MOST_IDS = 2**31 - 1  # ids are stored as int32
_DIMS: dict[Input, tuple[str, ...]] = {  # what each input may look like, by the number of dims
    "image": ("[N, F]", "[N, H, W]", "[N, H, W, C] or [N, C, H, W]"),
    "table": ("[N, F]",),
    "tokens": ("[N, L]",),
    "signal": ("[N, L]", "[N, C, L] or [N, L, C]"),
}
_NOUNS: dict[Input, str] = {"image": "images", "table": "tables", "tokens": "token ids", "signal": "signals"}
_LEAST_PIXELS = 64  # in a row of bytes that may be a flattened image
_WITH_CHANNELS = {"image": 4, "signal": 3}  # dims


@dataclass(frozen=True)
class Reading:
    """How an array is to be read; ``None``: as its dtype and dims suggest.

    Attributes:
        input: what rows are.
        channels: where an image or a signal has its channels.
        vocabulary: the number of token ids, if a run has fixed it; otherwise the training rows do.
    """

    input: Input | None = None
    channels: Channels | None = None
    vocabulary: int | None = None


AS_FOUND = Reading()


@dataclass(frozen=True)
class Layout:
    """How raw rows become samples.

    Attributes:
        input: what rows are.
        shape: of one sample.
        pixel_max: 255 for uint8 images, otherwise ``None``.
        channels: where raw rows have their channels; ``None`` if they have no such axis.
        hint: what to state if a guess is wrong, or empty.
    """

    input: Input
    shape: tuple[int, ...]
    pixel_max: float | None
    channels: Channels | None = None
    hint: str = ""

    def arrange(self, raw: NDArray[Any]) -> NDArray[Any]:
        """Raw rows [n, ...] as samples [n, *shape].

        Images are uint8 pixels or float32, token ids int64; tables and signals keep their dtype, in native
        byte order and with at most 64 bits.
        """
        if self.channels == "last":
            raw = np.moveaxis(raw, -1, 1)
        with np.errstate(over="ignore"):  # what is too large becomes infinity, which is refused
            raw = raw.astype(self._dtype(raw.dtype), copy=False)
        return np.ascontiguousarray(raw).reshape(len(raw), *self.shape)

    def _dtype(self, found: np.dtype[Any]) -> np.dtype[Any]:
        if self.input == "tokens":
            return np.dtype(np.int64)
        if self.input == "image":
            return np.dtype(np.float32 if self.pixel_max is None else np.uint8)
        return np.dtype(np.float64) if found.itemsize > 8 else found.newbyteorder("=")


def layout_of(dtype: np.dtype[Any], dims: tuple[int, ...], where: str, reading: Reading = AS_FOUND) -> Layout:
    """The layout of an input array of this dtype and these dims, rows first.

    Raises:
        InputError: the array is empty, or its dtype or dims are not those of the input that it is read as.
    """
    if 0 in dims:
        raise InputError(f"{where}: the array is empty, its shape is {list(dims)}")
    if not 2 <= len(dims) <= 4:
        raise InputError(f"{where}: shape {list(dims)}, expected [N, F], [N, H, W] or [N, C, H, W]")
    found: Input = reading.input or ("table" if len(dims) == 2 else "image")
    if len(dims) - 2 >= len(_DIMS[found]):
        expected = " or ".join(_DIMS[found])
        raise InputError(f"{where}: shape {list(dims)}, expected {expected} for {_NOUNS[found]} (--input {found})")
    _check_dtype(dtype, found, where)
    channels = _channels(dims, found, reading)
    pixel_max = 255.0 if found == "image" and dtype == np.uint8 else None
    shape = (dims[-1], *dims[1:-1]) if channels == "last" else dims[1:]
    if channels is None and (len(dims) == 3 or found == "signal"):
        shape = (1, *shape)
    return Layout(found, shape, pixel_max, channels, "" if reading.input else _hint(dtype, dims))


def check_channels(dims: tuple[int, ...], where: str, reading: Reading) -> None:
    """Refuse stated channels where rows have no axis of channels.

    Raises:
        InputError: they have none.
    """
    found = reading.input or ("table" if len(dims) == 2 else "image")
    if reading.channels is not None and _WITH_CHANNELS.get(found) != len(dims):
        raise InputError(
            f"{where}: --channels {reading.channels}: {_NOUNS[found]} of shape {list(dims)} have no axis of channels;"
            " leave it out"
        )


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
    """Look for values that are not token ids in rows [n, length]; ``first`` is the row of the first one.

    Raises:
        InputError: values are no int32 or int64, or one is not in 0..vocabulary-1.
    """
    if values.dtype not in (np.int32, np.int64):
        raise InputError(f"{where}: token ids are {values.dtype}, expected int32 or int64; convert with .astype")
    wrong = np.argwhere((values < 0) | (values >= vocabulary))
    if len(wrong):
        row, column = int(wrong[0][0]), int(wrong[0][1])
        remedy = (
            "number the tokens from 0"
            if vocabulary == MOST_IDS
            else "look words up in the vocabulary of the training rows"
        )
        raise InputError(
            f"{where}: row {first + row} holds id {values[row, column]} at position {column}, expected "
            f"0..{vocabulary - 1} ({vocabulary} ids); {remedy}"
        )


def check_pixels(values: NDArray[Any], most: float, first: int, where: str) -> None:
    """Look for pixels above ``most`` in uint8 rows [n, ...]; ``first`` is the row of the first one.

    Raises:
        InputError: a pixel is above it.
    """
    wrong = np.argwhere(values.reshape(len(values), -1) > most)
    if len(wrong):
        row, column = int(wrong[0][0]), int(wrong[0][1])
        found = values.reshape(len(values), -1)[row, column]
        raise InputError(f"{where}: row {first + row} holds {found} at position {column}, expected pixels 0..{most:g}")


def _check_dtype(dtype: np.dtype[Any], found: Input, where: str) -> None:
    if dtype.kind not in "biuf":
        raise InputError(f"{where}: dtype {dtype}, expected uint8 pixels or numbers (float or int)")
    if found == "image" and dtype.kind in "biu" and dtype != np.uint8:
        raise InputError(
            f"{where}: {dtype} images, expected uint8 (pixels 0..255) or float (values as they are); "
            "convert with .astype"
        )
    if found == "tokens" and dtype.kind not in "iu":
        raise InputError(f"{where}: {dtype} values, expected integers as token ids (--input tokens)")


def _channels(dims: tuple[int, ...], found: Input, reading: Reading) -> Channels | None:
    """Where rows have their channels, guessed if it is not stated."""
    if _WITH_CHANNELS.get(found) != len(dims):
        return None
    if reading.channels is not None:
        return reading.channels
    return "last" if found == "image" and _seem_last(dims) else "first"


def _hint(dtype: np.dtype[Any], dims: tuple[int, ...]) -> str:
    if len(dims) == 2 and dtype == np.uint8 and dims[1] >= _LEAST_PIXELS:
        return "state --input image if these are pixels"
    if len(dims) == 2 and dtype.kind in "iu" and dtype.itemsize > 1:
        return "state --input tokens if these are token ids"
    return ""


def _seem_last(dims: tuple[int, ...]) -> bool:
    """Whether [N, a, b, c] seems to end in channels; 1x1 and 3x3 maps, [N, C, 3, 3], begin with them."""
    return dims[2] != dims[3] and (dims[3] in (1, 3) or (dims[3] in (2, 4) and dims[1] > 4))
