"""Local Back-Propagation with dense (denoising) autoencoders, all in memory at once.

Written from the LBP paper (Applied Sciences 15(15) 8207) in plain PyTorch, to compare the machine
with. The classifier is one linear layer on the concatenation of all latents, as the paper has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference.batches import as_they_lie, shuffled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear

#: Gaussian numbers shaped as the inputs, for (cell, epoch, step); ``None``: a plain autoencoder.
Noise = Callable[[int, int, int, Tensor], Tensor] | None


class Cell:
    """An encoder W [n, d], b [n] and a decoder V [d, n], c [d]."""

    def __init__(self, index: int, values: list[Tensor], lr: float, weight_decay: float, noise: Noise = None):
        self.index, self.noise = index, noise
        self.w, self.b, self.v, self.c = (value.clone().requires_grad_() for value in values)
        self.optimizer = torch.optim.AdamW(
            [self.w, self.b, self.v, self.c], lr=lr, weight_decay=weight_decay, fused=True
        )

    def encode(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return linear(layer_norm(x, x.shape[1:]), self.w, self.b).relu()

    def step(self, x: Tensor, epoch: int, number: int) -> Tensor:
        """One step of AdamW; the latents of the clean inputs from before it."""
        clean = self.encode(x).detach()
        seen = x if self.noise is None else x + 0.2 * self.noise(self.index, epoch, number, x)
        made = linear(self.encode(seen), self.v, self.c).relu()
        loss = (made - x.flatten(1)).square().sum() / x[0].numel()  # per sample, mean over the elements
        self.optimizer.zero_grad()
        (loss / len(x)).backward()
        self.optimizer.step()
        return clean


class Classifier:
    """One linear layer on the concatenation of all cells' latents."""

    def __init__(self, weight: Tensor, bias: Tensor, lr: float, weight_decay: float):
        self.layer = nn.Linear(weight.shape[1], weight.shape[0])
        self.layer.weight = nn.Parameter(weight.clone())
        self.layer.bias = nn.Parameter(bias.clone())
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def step(self, latents: list[Tensor], y: Tensor) -> None:
        logits = self.layer(torch.cat(latents, 1))
        self.optimizer.zero_grad()
        (cross_entropy(logits, y, reduction="sum") / len(y)).backward()
        self.optimizer.step()


def sequence(
    cells: list[Cell], classifier: Classifier, x: Tensor, y: Tensor, seed: int, epochs: int, size: int
) -> None:
    """In each epoch: batch by batch through all cells, then the classifier on what they emitted."""
    for epoch in range(epochs):
        seen = []
        for number, batch in enumerate(shuffled(seed, epoch, len(x), size)):
            latents = [x[batch]]
            for cell in cells:
                latents.append(cell.step(latents[-1], epoch, number))
            seen.append((latents[1:], y[batch]))
        for latents, labels in seen:
            classifier.step(latents, labels)


def separate(
    cells: list[Cell], classifier: Classifier, x: Tensor, y: Tensor, seed: int, epochs: int, size: int
) -> None:
    """Cell by cell, then the classifier, for as many epochs, on the finished cells' latents."""
    latents = [x]
    for cell in cells:
        for epoch in range(epochs):
            for number, batch in enumerate(shuffled(seed, epoch, len(x), size)):
                cell.step(latents[-1][batch], epoch, number)
        with torch.no_grad():
            found = [cell.encode(latents[-1][batch]) for batch in as_they_lie(len(x), size)]
        latents.append(torch.cat(found))
    for epoch in range(epochs):
        for batch in shuffled(seed, epoch, len(x), size):
            classifier.step([z[batch] for z in latents[1:]], y[batch])
