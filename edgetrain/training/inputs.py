"""The prepared inputs of a run: latents 0, and how tables were scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgetrain.data.base import DataSet, Part
from edgetrain.data.prepare import Scaling, measure_scaling
from edgetrain.errors import InputError
from edgetrain.store.rows import RowFormat


@dataclass(frozen=True)
class Shape:
    """What a run remembers of its data set, to check and prepare new rows.

    Attributes:
        name: of the data set.
        shape: of one sample.
        pixel_max: as in ``DataSet``.
        table: as in ``DataSet``.
        classes: number of classes.
        names: of the classes, or empty.
        vocabulary: as in ``DataSet``; records from before there were texts have none.
    """

    name: str
    shape: tuple[int, ...]
    pixel_max: float | None
    table: bool
    classes: int
    names: tuple[str, ...]
    vocabulary: int | None = None

    @classmethod
    def of(cls, data: DataSet) -> Shape:
        """What to remember of a data set."""
        known = (data.name, data.shape, data.pixel_max, data.table, data.classes, data.names)
        return cls(*known, data.vocabulary)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shape:
        """From its JSON form."""
        return cls(**{**values, "shape": tuple(values["shape"]), "names": tuple(values["names"])})

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


def _kind(rows: DataSet | Shape) -> str:
    """What rows hold, in words; rows of one kind can be told apart by their shape only."""
    if rows.vocabulary is not None:
        return f"ids of {rows.vocabulary} tokens"
    return "floating-point values" if rows.pixel_max is None else "8-bit pixels"


def scaling_of(data: DataSet, part: Part, nonnegative: bool) -> Scaling | None:
    """Columns of a table are standardised, or brought to 0..1 for rules that reconstruct their input."""
    if not data.table:
        return None
    return measure_scaling(part, "unit" if nonnegative else "standard")


def pack(scaling: Scaling | None) -> dict[str, torch.Tensor]:
    """A scaling as tensors, to be committed with the cells."""
    if scaling is None:
        return {}
    return {
        "shift": torch.from_numpy(scaling.shift),
        "scale": torch.from_numpy(scaling.scale),
        "rest": torch.from_numpy(scaling.rest),
        "clip": torch.tensor([scaling.clip], dtype=torch.uint8),
    }


def unpack(tensors: dict[str, torch.Tensor]) -> Scaling | None:
    """The inverse of ``pack``."""
    if not tensors:
        return None
    found = {name: tensors[name].numpy().astype(np.float64) for name in ("shift", "scale", "rest") if name in tensors}
    return Scaling(**found, clip=bool(tensors["clip"].item()))
