"""Augmentation of images: a few tensor operations on the device, told by numbers that belong to samples.

Each operation takes a batch x [B, C, H, W] and uniform numbers u [B, columns] in 0..1 of its own, so
that what happens to a sample depends on (seed, epoch, sample) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgetrain.errors import InputError

_SHARE = 8  # a crop moves by up to 1/8 of the side (4 of 32), cut-out squares have half of the side


def crop(x: Tensor, u: Tensor) -> Tensor:
    """Move by up to an eighth of the side either way, black coming in (the usual padded random crop)."""
    reach = [max(1, side // _SHARE) for side in x.shape[2:]]
    wide = pad(x, (reach[1], reach[1], reach[0], reach[0]))
    for axis, (side, most) in enumerate(zip(x.shape[2:], reach, strict=True)):
        first = (u[:, axis] * (2 * most + 1)).long().clamp_(max=2 * most)  # [B]
        picked = first[:, None] + torch.arange(side, device=x.device)  # [B, side]
        index = picked[:, None, :, None] if axis == 0 else picked[:, None, None, :]
        shape = list(wide.shape)
        shape[2 + axis] = side
        wide = wide.gather(2 + axis, index.expand(shape))
    return wide


def flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirror every second image, left to right."""
    return torch.where((u[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Blacken a square of half the side, centred anywhere (DeVries and Taylor 2017, arXiv:1708.04552)."""
    outside = torch.zeros((), dtype=torch.bool, device=x.device)
    for axis, side in enumerate(x.shape[2:]):
        wide = max(1, side // 2)
        first = (u[:, axis] * side).floor()[:, None] - wide // 2  # [B, 1]
        away = torch.arange(side, device=x.device) - first  # [B, side], 0 where the square begins
        away = (away < 0) | (away >= wide)
        outside = outside | (away[:, None, :, None] if axis == 0 else away[:, None, None, :])
    return x * outside


@dataclass(frozen=True)
class _Operation:
    columns: int
    apply: Callable[[Tensor, Tensor], Tensor]


_OPERATIONS = {"crop": _Operation(2, crop), "flip": _Operation(1, flip), "cutout": _Operation(2, cutout)}


@dataclass(frozen=True)
class Augmentation:
    """Operations in the order in which they are applied.

    Attributes:
        names: of the operations.
    """

    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, shape: tuple[int, ...]) -> Augmentation:
        """``"crop,flip"`` for samples of ``shape``.

        Raises:
            InputError: unknown operation, one named twice, or the data are no images.
        """
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in _OPERATIONS:
                raise InputError(f"--augment {text!r}: unknown {name!r}; expected some of {', '.join(_OPERATIONS)}")
            if names.count(name) > 1:
                raise InputError(f"--augment {text!r}: names {name!r} more than once")
        if len(shape) != 3:
            raise InputError(f"--augment {text!r}: needs images; the data have rows of shape {shape}")
        return cls(names)

    @property
    def columns(self) -> int:
        """Uniform numbers that a sample needs."""
        return sum(_OPERATIONS[name].columns for name in self.names)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """Augmented images [B, C, H, W]; ``u`` is [B, columns]."""
        first = 0
        for name in self.names:
            operation = _OPERATIONS[name]
            x = operation.apply(x, u[:, first : first + operation.columns])
            first += operation.columns
        return x
