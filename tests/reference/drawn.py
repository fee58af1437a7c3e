"""Numbers for the checks of the references: the same ones at each call."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, key: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian numbers, halved: as weights they leave some units on and some off."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64).to(dtype) / 2


def noise(cell: int, epoch: int, step: int, like: Tensor) -> Tensor:
    """Gaussian numbers shaped as ``like``, others for each cell, epoch and step."""
    return 2 * normal(*like.shape, key=1_000_000 + 10_000 * cell + 100 * epoch + step, dtype=like.dtype)


def labels(rows: int, classes: int) -> Tensor:
    return torch.arange(rows) * 5 % classes


def leaves(values: list[Tensor]) -> list[Tensor]:
    """Copies that autograd follows."""
    return [value.clone().requires_grad_() for value in values]


def stepped(values: list[Tensor], gradients: list[Tensor], lr: float, decay: float = 0.0) -> list[Tensor]:
    """After the first step of Adam, AdamW or Adamax: lr along the gradients' signs, and the weights' decay."""
    pairs = zip(values, gradients, strict=True)
    return [(1 - lr * decay) * value - lr * slope / (slope.abs() + 1e-8) for value, slope in pairs]
