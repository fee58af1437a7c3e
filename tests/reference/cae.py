"""Local Back-Propagation with convolutional autoencoders, all in memory at once.

Written from the LBP paper (Applied Sciences 15(15) 8207) in plain PyTorch, to compare the machine
with. A side of even length meets a 3-wide kernel and is halved; its decoder doubles it. A side of odd
length meets a 2-wide kernel, grows by one and is halved (7 -> 8 -> 4); its decoder has stride 1 and a
kernel as wide as the latent side (4 -> 7). Each of the two sides goes its own way.
"""

from __future__ import annotations

import torch
from reference.batches import as_they_lie, shuffled
from reference.lbp import Classifier
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, layer_norm, max_pool2d


def kernels(side: int) -> tuple[int, int]:
    """How wide the encoder's and the decoder's kernels are along a side of the input."""
    return (2, (side + 1) // 2) if side % 2 else (3, 2)


class Cell:
    """Convolution [n, d, ., .] with bias [n], transposed convolution [n, d, ., .] with bias [d]."""

    def __init__(self, values: list[Tensor], lr: float, weight_decay: float, prenorm: bool = True):
        self.prenorm = prenorm
        self.w, self.b, self.v, self.c = (value.clone().requires_grad_() for value in values)
        self.optimizer = torch.optim.AdamW(
            [self.w, self.b, self.v, self.c], lr=lr, weight_decay=weight_decay, fused=True
        )

    def encode(self, x: Tensor) -> Tensor:
        seen = layer_norm(x, x.shape[1:]) if self.prenorm else x
        return max_pool2d(conv2d(seen, self.w, self.b, padding=1).relu(), 2)

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """Back to inputs of height x width."""
        stride = (1 if height % 2 else 2, 1 if width % 2 else 2)
        return conv_transpose2d(z, self.v, self.c, stride=stride).relu()

    def step(self, x: Tensor) -> Tensor:
        """One step of AdamW; the latents from before it."""
        for side, encoder, decoder in zip(x.shape[2:], self.w.shape[2:], self.v.shape[2:], strict=True):
            assert (encoder, decoder) == kernels(side)
        z = self.encode(x)
        made = self.decode(z, x.shape[2], x.shape[3])
        loss = (made - x).square().sum() / x[0].numel()  # per sample, mean over the elements
        self.optimizer.zero_grad()
        (loss / len(x)).backward()
        self.optimizer.step()
        return z.detach()


def sequence(
    cells: list[Cell], classifier: Classifier, x: Tensor, y: Tensor, seed: int, epochs: int, size: int
) -> None:
    """In each epoch: batch by batch through all cells, then the classifier on what they emitted."""
    for epoch in range(epochs):
        seen = []
        for batch in shuffled(seed, epoch, len(x), size):
            latents = [x[batch]]
            for cell in cells:
                latents.append(cell.step(latents[-1]))
            seen.append(([z.flatten(1) for z in latents[1:]], y[batch]))
        for flat, labels in seen:
            classifier.step(flat, labels)


def separate(
    cells: list[Cell], classifier: Classifier, x: Tensor, y: Tensor, seed: int, epochs: int, size: int
) -> None:
    """Cell by cell, then the classifier, for as many epochs, on the finished cells' latents."""
    latents = [x]
    for cell in cells:
        for epoch in range(epochs):
            for batch in shuffled(seed, epoch, len(x), size):
                cell.step(latents[-1][batch])
        with torch.no_grad():
            found = [cell.encode(latents[-1][batch]) for batch in as_they_lie(len(x), size)]
        latents.append(torch.cat(found))
    for epoch in range(epochs):
        for batch in shuffled(seed, epoch, len(x), size):
            classifier.step([z[batch].flatten(1) for z in latents[1:]], y[batch])
