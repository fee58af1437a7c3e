"""Local errors of Nøkland and Eidnes (arXiv 1901.06656), "predsim", all in memory at once.

Plain PyTorch, to compare the machine with. Each cell's loss is 0.01 of a cross-entropy, by a linear
head on the pooled map, and 0.99 of the mean squared difference between two matrices of similarity
among the samples of the batch: that of a learned map of the activations, and that of the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from reference.batches import as_they_lie, shuffled
from torch import Tensor, nn
from torch.nn.functional import (
    adaptive_avg_pool2d,
    conv2d,
    cross_entropy,
    leaky_relu,
    linear,
    max_pool2d,
    one_hot,
)

PREDICTION, SIMILARITY = 0.01, 0.99
HEAD_INPUTS = 2048
TINY = 1e-8  # beside each norm, as in the authors' program: constant rows are like nothing


def similarity(rows: Tensor) -> Tensor:
    """Cosines [B, B] between mean-centred rows, clamped to [-1, 1]."""
    centred = rows - rows.mean(1, keepdim=True)
    directions = centred / (torch.linalg.vector_norm(centred, dim=1, keepdim=True) + TINY)
    return (directions @ directions.T).clamp(-1, 1)


def similarity_by_pairs(rows: Tensor) -> Tensor:
    """The same, pair by pair."""
    found = rows.new_zeros(len(rows), len(rows))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            a, b = one - one.sum() / len(one), other - other.sum() / len(other)
            lengths = (torch.linalg.vector_norm(a) + TINY) * (torch.linalg.vector_norm(b) + TINY)
            found[i, j] = ((a * b).sum() / lengths).clamp(-1, 1)
    return found


def head_side(channels: int, height: int, width: int) -> int:
    """The side p of the largest square that keeps channels p p within the head's inputs."""
    fitting = [p for p in range(1, min(height, width) + 1) if channels * p * p <= HEAD_INPUTS]
    return max(fitting, default=1)


class Cell:
    """Weights W (dense [n, d] or 3x3 convolution [n, d, 3, 3]), a head, and a map for similarity.

    Args:
        weight: W.
        bias: [n], or none.
        norm: batch normalisation after W, copied with its state; or none.
        head: weight [C, n] (dense) or [C, n p p], and bias [C].
        mapping: without bias, [m, n] (dense) or [m, n, 3, 3].
        lr: Adam's.
        pool: 2x2 maximum of the output; no loss sees it.
        matrix: how similarity is computed.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        norm: nn.Module | None,
        head: tuple[Tensor, Tensor],
        mapping: Tensor,
        lr: float,
        pool: bool = False,
        matrix: Callable[[Tensor], Tensor] = similarity,
    ):
        self.pool, self.matrix = pool, matrix
        self.weight = weight.clone().requires_grad_()
        self.bias = None if bias is None else bias.clone().requires_grad_()
        self.norm = nn.Identity() if norm is None else deepcopy(norm)
        self.head = tuple(value.clone().requires_grad_() for value in head)
        self.mapping = mapping.clone().requires_grad_()
        given = [self.weight, self.bias, *self.norm.parameters(), *self.head, self.mapping]
        self.optimizer = torch.optim.Adam([value for value in given if value is not None], lr=lr, fused=True)

    def activations(self, x: Tensor) -> Tensor:
        """What the loss acts on, before pooling."""
        if self.weight.ndim == 4:
            return leaky_relu(self.norm(conv2d(x, self.weight, self.bias, padding=1)), 0.01)
        return leaky_relu(self.norm(linear(x.flatten(1), self.weight, self.bias)), 0.01)

    def handed_on(self, a: Tensor) -> Tensor:
        return max_pool2d(a, 2) if self.pool else a

    def logits(self, a: Tensor) -> Tensor:
        """The head's prediction."""
        if a.ndim == 4:
            a = adaptive_avg_pool2d(a, head_side(*a.shape[1:]))
        return linear(a.flatten(1), *self.head)

    def rows(self, a: Tensor) -> Tensor:
        """What is compared among samples."""
        if a.ndim == 2:
            return linear(a, self.mapping)
        mapped = conv2d(a, self.mapping, padding=1).flatten(2)
        return mapped.std(2) if mapped.shape[2] > 1 else mapped.flatten(1)

    def loss(self, a: Tensor, y: Tensor) -> Tensor:
        """Summed over the samples."""
        logits = self.logits(a)
        truth = one_hot(y, logits.shape[1]).to(a.dtype)
        difference = (self.matrix(self.rows(a)) - self.matrix(truth)).square().mean()
        return PREDICTION * cross_entropy(logits, y, reduction="sum") + SIMILARITY * difference * len(a)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of Adam; the output from before it, normalised over this batch."""
        self.norm.train()
        a = self.activations(x)
        self.optimizer.zero_grad()
        (self.loss(a, y) / len(x)).backward()
        self.optimizer.step()
        return self.handed_on(a.detach())

    @torch.no_grad()
    def finished(self, x: Tensor) -> Tensor:
        """The output once the cell is trained: normalised by the running statistics."""
        self.norm.eval()
        return self.handed_on(self.activations(x))

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """The head's prediction once the cell is trained."""
        self.norm.eval()
        return self.logits(self.activations(x))


def sequence(cells: list[Cell], x: Tensor, y: Tensor, seed: int, epochs: int, size: int) -> None:
    """Batch by batch through all cells."""
    for epoch in range(epochs):
        for batch in shuffled(seed, epoch, len(x), size):
            a = x[batch]
            for cell in cells:
                a = cell.step(a, y[batch])


def separate(cells: list[Cell], x: Tensor, y: Tensor, seed: int, epochs: int, size: int) -> None:
    """Cell by cell; the next one reads what the finished cell makes of all samples."""
    for cell in cells:
        for epoch in range(epochs):
            for batch in shuffled(seed, epoch, len(x), size):
                cell.step(x[batch], y[batch])
        x = torch.cat([cell.finished(x[batch]) for batch in as_they_lie(len(x), size)])
