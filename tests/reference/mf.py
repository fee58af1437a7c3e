"""Mono-Forward as plainly as it can be said: all cells and the whole data set in memory at once.

Written from the paper (arXiv 2501.09238, Algorithm 1) in plain PyTorch, to compare the machine with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference.batches import as_they_lie, shuffled
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, linear

Kept = Callable[[Tensor], Tensor]


class Cell:
    """Weights W (dense [n, d], or 3x3 convolution [n, d, 3, 3]) and their projection M [C, ...]."""

    def __init__(self, weight: Tensor, projection: Tensor, lr: float):
        self.weight = weight.clone().requires_grad_()
        self.projection = projection.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.weight, self.projection], lr=lr, fused=True)

    def activations(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 4:
            return avg_pool2d(conv2d(x, self.weight, padding=1).relu(), 2)
        return linear(x.flatten(1), self.weight).relu()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of Adam; the activations from before it."""
        a = self.activations(x)
        goodness = linear(a.flatten(1), self.projection)
        self.optimizer.zero_grad()
        (cross_entropy(goodness, y, reduction="sum") / len(x)).backward()
        self.optimizer.step()
        return a.detach()


def unchanged(a: Tensor) -> Tensor:
    return a


def sequence(
    cells: list[Cell], x: Tensor, y: Tensor, seed: int, epochs: int, size: int, kept: Kept = unchanged
) -> None:
    """Batch by batch through all cells; ``kept`` is what becomes of activations on their way."""
    for epoch in range(epochs):
        for batch in shuffled(seed, epoch, len(x), size):
            a = x[batch]
            for cell in cells:
                a = kept(cell.step(a, y[batch]))


def separate(
    cells: list[Cell], x: Tensor, y: Tensor, seed: int, epochs: int, size: int, kept: Kept = unchanged
) -> None:
    """Cell by cell; the next one reads what the finished cell makes of all samples."""
    for cell in cells:
        for epoch in range(epochs):
            for batch in shuffled(seed, epoch, len(x), size):
                cell.step(x[batch], y[batch])
        with torch.no_grad():
            x = torch.cat([kept(cell.activations(x[batch])) for batch in as_they_lie(len(x), size)])
