"""Stochastic Layer-wise Learning (arXiv 2505.05181), all in memory at once.

Plain PyTorch, to compare the machine with. R [n, C] is fixed and given, as is the parent's projection
of the inputs [d, C]; masks of R's entries come in as a callable and fall on R alone, not on the parent's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference.batches import as_they_lie, shuffled
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, one_hot

#: Zeros and ones shaped as R, for (cell, epoch, step); ``None``: nothing is dropped.
Mask = Callable[[int, int, int, Tensor], Tensor] | None


def local_loss(v: Tensor, parent: Tensor, y: Tensor, beta: float) -> Tensor:
    """Summed CE(q, y) - beta log sum_c sqrt(w_c q_c), with q and w the softmax of v and parent."""
    log_q, log_w = v.log_softmax(1), parent.detach().log_softmax(1)
    # sqrt(w q) = exp((log w + log q) / 2): its gradient stays finite where q runs out of bits
    affinity = ((log_w + log_q) / 2).logsumexp(1)
    return cross_entropy(v, y, reduction="sum") - beta * affinity.sum()


def slope_by_hand(v: Tensor, parent: Tensor, y: Tensor, beta: float) -> Tensor:
    """The gradient of ``local_loss`` at v: (q - Y) + beta/2 (q - s), s proportional to sqrt(w q)."""
    q, w = v.softmax(1), parent.softmax(1)
    s = (w * q).sqrt()
    s = s / s.sum(1, keepdim=True)
    return (q - one_hot(y, v.shape[1])) + beta / 2 * (q - s)


class Cell:
    """Weights W [n, d] and b [n], fixed R [n, C] and the fixed projection of the inputs [d, C]."""

    def __init__(
        self,
        index: int,
        weight: Tensor,
        bias: Tensor,
        r: Tensor,
        r_parent: Tensor,
        lr: float,
        beta: float = 1.0,
        p: float = 0.0,
        mask: Mask = None,
        by_hand: bool = False,
    ):
        self.index, self.r, self.r_parent = index, r, r_parent
        self.beta, self.p, self.mask, self.by_hand = beta, p, mask, by_hand
        self.weight = weight.clone().requires_grad_()
        self.bias = bias.clone().requires_grad_()
        self.optimizer = torch.optim.Adamax([self.weight, self.bias], lr=lr, foreach=False)

    def activations(self, x: Tensor) -> Tensor:
        return linear(x.flatten(1), self.weight, self.bias).relu()

    def scores(self, x: Tensor) -> Tensor:
        """The logits that predict, with nothing dropped."""
        return self.activations(x) @ self.r

    def step(self, x: Tensor, y: Tensor, epoch: int, number: int) -> Tensor:
        """One step of Adamax; the activations from before it."""
        x = x.flatten(1)
        r = self.r
        if self.mask is not None:
            r = r * self.mask(self.index, epoch, number, r) / (1 - self.p)
        a = self.activations(x)
        v, parent = a @ r, x @ self.r_parent
        self.optimizer.zero_grad()
        if self.by_hand:
            with torch.no_grad():
                dv = slope_by_hand(v, parent, y, self.beta) / len(x)
                dz = (dv @ r.T) * (a > 0)
                self.weight.grad = dz.T @ x
                self.bias.grad = dz.sum(0)
        else:
            (local_loss(v, parent, y, self.beta) / len(x)).backward()
        self.optimizer.step()
        return a.detach()


def summary(latents: Tensor, how: str) -> Tensor:
    """What stands for token latents [B, T, D]: the class token (``class``, index 0) or their ``mean``."""
    return latents[:, 0] if how == "class" else latents.mean(1)


def token_loss(
    tokens: Tensor, inputs: Tensor, y: Tensor, r: Tensor, r_parent: Tensor, how: str, beta: float = 1.0
) -> Tensor:
    """The summed local loss of token latents [B, T, D] with R [D, C].

    ``inputs`` are the cell's: tokens [B, T, D'] are summed up as the latents are, all else is flattened.
    """
    seen = summary(inputs, how) if inputs.ndim == 3 else inputs.flatten(1)
    return local_loss(summary(tokens, how) @ r, seen @ r_parent, y, beta)


def sequence(cells: list[Cell], x: Tensor, y: Tensor, seed: int, epochs: int, size: int) -> None:
    """Batch by batch through all cells."""
    for epoch in range(epochs):
        for number, batch in enumerate(shuffled(seed, epoch, len(x), size)):
            a = x[batch]
            for cell in cells:
                a = cell.step(a, y[batch], epoch, number)


def separate(cells: list[Cell], x: Tensor, y: Tensor, seed: int, epochs: int, size: int) -> None:
    """Cell by cell; the next one reads what the finished cell makes of all samples."""
    for cell in cells:
        for epoch in range(epochs):
            for number, batch in enumerate(shuffled(seed, epoch, len(x), size)):
                cell.step(x[batch], y[batch], epoch, number)
        with torch.no_grad():
            x = torch.cat([cell.activations(x[batch]) for batch in as_they_lie(len(x), size)])
