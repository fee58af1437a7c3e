"""Forward-Forward (arXiv 2212.13345) and SymBa (arXiv 2303.08418), all in memory at once.

Plain PyTorch, to compare the machine with. Dense cells; goodness is the mean of squared activations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference.batches import as_they_lie, shuffled
from torch import Tensor
from torch.nn.functional import linear, one_hot, softplus

#: Wrong labels for (epoch, sample numbers, right labels).
Wrong = Callable[[int, Tensor, Tensor], Tensor]
#: Summed loss of (goodness of right labels [B], of wrong labels [B]).
Loss = Callable[[Tensor, Tensor], Tensor]

THETA, ALPHA = 2.0, 4.0


def forward_forward(good: Tensor, bad: Tensor) -> Tensor:
    return (softplus(THETA - good) + softplus(bad - THETA)).sum() / 2


def symba(good: Tensor, bad: Tensor) -> Tensor:
    return softplus(-ALPHA * (good - bad)).sum()


def marked(x: Tensor, marks: Tensor) -> Tensor:
    """Rows [B, d] whose first C entries are ``marks`` [B, C]."""
    marks = marks.to(x.dtype)
    return torch.cat([marks, x.flatten(1)[:, marks.shape[1] :]], 1)


def labelled(x: Tensor, y: Tensor, classes: int) -> Tensor:
    return marked(x, one_hot(y, classes))


def neutral(x: Tensor, classes: int) -> Tensor:
    return marked(x, x.new_full((len(x), classes), 1 / classes))


def normed(x: Tensor) -> Tensor:
    """Each row by the root of its mean square."""
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def goodness(a: Tensor) -> Tensor:
    return a.square().mean(1)


class Cell:
    """Weights W [n, d] and bias b [n], or none; the ``first`` cell reads its input as it is."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, lr: float, first: bool = False, loss: Loss = forward_forward
    ):
        self.first, self.loss = first, loss
        self.weight = weight.clone().requires_grad_()
        self.bias = None if bias is None else bias.clone().requires_grad_()
        parameters = [value for value in (self.weight, self.bias) if value is not None]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)

    def activations(self, x: Tensor) -> Tensor:
        return linear(x if self.first else normed(x), self.weight, self.bias).relu()

    def step(self, right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """One step of Adam; both activations from before it."""
        good, bad = self.activations(right), self.activations(wrong)
        self.optimizer.zero_grad()
        (self.loss(goodness(good), goodness(bad)) / len(right)).backward()
        self.optimizer.step()
        return good.detach(), bad.detach()

    @torch.no_grad()
    def gradients_by_hand(self, right: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of W and b by the chain rule, written out."""
        seen = [x if self.first else normed(x) for x in (right, wrong)]
        a = [self.activations(x) for x in (right, wrong)]
        good, bad = goodness(a[0]), goodness(a[1])
        if self.loss is symba:
            slope = -ALPHA * torch.sigmoid(-ALPHA * (good - bad))
            slopes = [slope, -slope]
        else:
            slopes = [-torch.sigmoid(THETA - good) / 2, torch.sigmoid(bad - THETA) / 2]
        units, size = self.weight.shape[0], len(right)
        # a is zero wherever the rectifier's slope is
        dz = [d[:, None] * 2 * value / (units * size) for d, value in zip(slopes, a, strict=True)]
        return dz[0].T @ seen[0] + dz[1].T @ seen[1], dz[0].sum(0) + dz[1].sum(0)


def sequence(
    cells: list[Cell],
    x: Tensor,
    y: Tensor,
    seed: int,
    epochs: int,
    size: int,
    classes: int,
    wrong: Wrong,
) -> None:
    """Batch by batch through all cells."""
    for epoch in range(epochs):
        for batch in shuffled(seed, epoch, len(x), size):
            good = labelled(x[batch], y[batch], classes)
            bad = labelled(x[batch], wrong(epoch, batch, y[batch]), classes)
            for cell in cells:
                good, bad = cell.step(good, bad)


def separate(
    cells: list[Cell],
    x: Tensor,
    y: Tensor,
    seed: int,
    epochs: int,
    size: int,
    classes: int,
    wrong: Wrong,
    stored: int | None = None,
) -> None:
    """Cell by cell; the next one reads what the finished cells make of all samples.

    Wrong labels may change from epoch to epoch. With ``stored`` a number, the latents of wrongly
    labelled samples that the second and later cells read are made once, from the labels of that epoch;
    with ``None`` they are made anew, from the inputs, for each batch of each epoch.
    """
    good = labelled(x, y, classes)
    bad = None
    for depth, cell in enumerate(cells):
        for epoch in range(epochs):
            for batch in shuffled(seed, epoch, len(x), size):
                if bad is None:
                    seen = labelled(x[batch], wrong(epoch, batch, y[batch]), classes)
                    seen = through(cells[:depth], seen)[-1] if depth else seen
                else:
                    seen = bad[batch]
                cell.step(good[batch], seen)
        parts = list(as_they_lie(len(x), size))
        if stored is not None and bad is None:
            bad = torch.cat([labelled(x[batch], wrong(stored, batch, y[batch]), classes) for batch in parts])
        good = torch.cat([through([cell], good[batch])[-1] for batch in parts])
        if bad is not None:
            bad = torch.cat([through([cell], bad[batch])[-1] for batch in parts])


@torch.no_grad()
def through(cells: list[Cell], x: Tensor) -> list[Tensor]:
    """The activations of each cell in turn."""
    found = []
    for cell in cells:
        x = cell.activations(x)
        found.append(x)
    return found


def predict(cells: list[Cell], x: Tensor, classes: int) -> Tensor:
    """Scores [B, C]: with each label in turn, the sum of all cells' goodness."""
    scores = x.new_zeros(len(x), classes)
    for label in range(classes):
        tried = labelled(x, torch.full((len(x),), label), classes)
        for a in through(cells, tried):
            scores[:, label] += goodness(a)
    return scores


def one_pass(cells: list[Cell], x: Tensor, classes: int) -> list[Tensor]:
    """Each cell's normalised activations for the neutral label."""
    return [normed(a) for a in through(cells, neutral(x, classes))]
