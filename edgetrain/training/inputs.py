"""The prepared inputs of a run: latents 0, how they were read, and how tables were scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from edgetrain.data.base import DataSet, Part
from edgetrain.data.layout import Channels, Input, Reading
from edgetrain.data.prepare import (
    Prepared,
    Scaling,
    Statistics,
    measure_normalization,
    measure_scaling,
    scaling_beyond_unit,
)
from edgetrain.errors import InputError, shown
from edgetrain.store.rows import Normalization, RowFormat

_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of torchvision's models


@dataclass(frozen=True)
class Shape:
    """What a run remembers of its data set, to check and prepare new rows.

    Attributes:
        name: of the data set.
        shape: of one sample.
        pixel_max: as in ``DataSet``.
        input: as in ``DataSet``.
        classes: number of classes.
        names: of the classes, or empty.
        vocabulary: as in ``DataSet``.
        channels: as in ``DataSet``.
    """

    name: str
    shape: tuple[int, ...]
    pixel_max: float | None
    input: Input
    classes: int
    names: tuple[str, ...]
    vocabulary: int | None = None
    channels: Channels | None = None

    @classmethod
    def of(cls, data: DataSet) -> Shape:
        """What to remember of a data set."""
        known = (data.name, data.shape, data.pixel_max, data.input, data.classes, data.names)
        return cls(*known, data.vocabulary, data.channels)

    @property
    def reading(self) -> Reading:
        """How new rows are to be read."""
        return Reading(self.input, self.channels, self.vocabulary)

    @property
    def format(self) -> RowFormat:
        """How a prepared input lies on disk."""
        if self.vocabulary is not None:
            return RowFormat(self.shape, "tokens")
        if self.pixel_max is None:
            return RowFormat(self.shape, "float32")
        return RowFormat(self.shape, "pixels", self.pixel_max)

    def check(self, data: DataSet) -> None:
        """Refuse rows that are not like those the run was trained on.

        Raises:
            InputError: shape or kind differ.
        """
        if data.shape != self.shape:
            raise InputError(f"{data.name}: rows of shape {data.shape}; this run was trained on {self.shape}")
        found, expected = _kind(data), _kind(self)
        if found != expected:
            raise InputError(f"{data.name}: holds {found}; this run was trained on {expected}")


def digest(rows: Prepared) -> str:
    """A checksum of prepared rows and their labels, in hex, to recognise them."""
    return rows.x.digest() + ("" if rows.y is None else rows.y.digest())


def describe(data: DataSet, nonnegative: bool, normalize: str | None = None) -> str:
    """What the training rows are and how they were read, in a line.

    Args:
        data: has training rows.
        nonnegative: whether the rule reconstructs its inputs.
        normalize: see ``normalization_of``.
    """
    assert data.train is not None
    size = "x".join(map(str, data.shape))
    scaled = "scaled to 0..1" if nonnegative else "standardised"
    words = {
        "image": [f"images, {size}", _values_in_words(data, nonnegative)],
        "table": [f"rows of a table, {size} columns", f"each {scaled}"],
        "signal": [f"signals, {size}", f"each channel {scaled}"],
        "tokens": [f"rows of {size} token ids, 0..{(data.vocabulary or 0) - 1}"],
    }[data.input]
    if normalize not in (None, "none"):
        words.append(f"normalised by {'the training images' if normalize == 'data' else normalize}")
    if data.channels is not None:
        words.append(f"channels {data.channels}")
    return f"{data.train.rows:,} {', '.join(words)}{data.hint and f'; {data.hint}'}"


def _values_in_words(data: DataSet, nonnegative: bool) -> str:
    if data.pixel_max is not None:
        return f"0..{data.pixel_max:g} scaled to 0..1"
    return "values scaled to 0..1 unless they are within it" if nonnegative else "values as they are"


def _kind(rows: DataSet | Shape) -> str:
    """What rows hold, in words; rows of one kind can be told apart by their shape only."""
    if rows.vocabulary is not None:
        return f"ids of {rows.vocabulary} tokens"
    if rows.input == "image":
        return "floating-point values" if rows.pixel_max is None else "8-bit pixels"
    return f"rows of a {rows.input}"


def normalization_of(text: str | None, data: DataSet, nonnegative: bool, measured: bool = True) -> Normalization | None:
    """How ``--normalize`` says that images are normalised; ``None``: they are not.

    Args:
        text: ``None``, ``none``, ``data``, ``imagenet`` or ``MEAN,.../STD,...``.
        data: has training rows.
        nonnegative: whether the rule reconstructs its inputs.
        measured: whether ``data`` is measured; otherwise mean 0 and deviation 1 stand for it, as in a plan.

    Raises:
        InputError: it cannot be read, or does not suit the data or the rule.
    """
    if text in (None, "none"):
        return None
    if data.input != "image":
        raise InputError(f"--normalize {shown(text)}: is for images; the columns of tables are standardised anyway")
    if nonnegative:
        raise InputError(f"--normalize {shown(text)}: this rule reconstructs its inputs, which must be within 0..1")
    channels = data.shape[0] if len(data.shape) == 3 else 1
    if text == "data":
        assert data.train is not None
        unmeasured = Normalization((0.0,) * channels, (1.0,) * channels)
        return measure_normalization(data, data.train) if measured else unmeasured
    found = _IMAGENET if text == "imagenet" else _stated_normalization(text)
    if len(found.mean) != channels:
        raise InputError(f"--normalize {shown(text)}: has {len(found.mean)} channels; the images have {channels}")
    return found


def _stated_normalization(text: str) -> Normalization:
    try:
        mean, std = (tuple(float(part) for part in side.split(",")) for side in text.split("/"))
    except ValueError:
        mean = std = ()
    sound = all(map(math.isfinite, mean)) and all(0 < each < math.inf for each in std)
    if not mean or len(mean) != len(std) or not sound:
        raise InputError(
            f"--normalize {shown(text)}: expected data, imagenet, none, or means and deviations by channel, such as"
            " 0.5,0.5,0.5/0.25,0.25,0.25"
        )
    return Normalization(mean, std)


def scaling_of(data: DataSet, part: Part, nonnegative: bool) -> Scaling | None:
    """Tables and signals are standardised, or scaled to 0..1 for rules that reconstruct their input.

    Floating-point images stay as they are, but for those rules they are scaled to 0..1 if they are not within it.
    """
    if data.input in ("table", "signal"):
        return measure_scaling(part, "unit" if nonnegative else "standard")
    if data.input == "image" and data.pixel_max is None and nonnegative:
        return scaling_beyond_unit(part)
    return None


def statistics_of(data: DataSet, nonnegative: bool, normalize: str | None) -> Statistics:
    """Measure on the training rows how rows are prepared.

    Args:
        data: has training rows.
        nonnegative: whether the rule reconstructs its inputs.
        normalize: see ``normalization_of``.

    Raises:
        InputError: a value is not finite, or images cannot be normalised like this.
    """
    assert data.train is not None
    return Statistics(scaling_of(data, data.train, nonnegative), normalization_of(normalize, data, nonnegative))


def pack(statistics: Statistics) -> dict[str, torch.Tensor]:
    """Statistics as tensors, to be saved with the cells."""
    packed: dict[str, torch.Tensor] = {}
    if (scaling := statistics.scaling) is not None:
        packed |= {
            "shift": torch.from_numpy(scaling.shift),
            "scale": torch.from_numpy(scaling.scale),
            "rest": torch.from_numpy(scaling.rest),
            "clip": torch.tensor([scaling.clip], dtype=torch.uint8),
        }
    if (normalization := statistics.normalization) is not None:
        packed |= {
            "mean": torch.tensor(normalization.mean, dtype=torch.float64),
            "std": torch.tensor(normalization.std, dtype=torch.float64),
        }
    return packed


def unpack(tensors: dict[str, torch.Tensor]) -> Statistics:
    """The inverse of ``pack``."""
    scaling = normalization = None
    if "scale" in tensors:
        names = [name for name in ("shift", "scale", "rest") if name in tensors]
        found = {name: tensors[name].numpy().astype(np.float64) for name in names}
        scaling = Scaling(**found, clip=bool(tensors["clip"].item()))
    if "std" in tensors:
        normalization = Normalization(tuple(tensors["mean"].tolist()), tuple(tensors["std"].tolist()))
    return Statistics(scaling, normalization)
