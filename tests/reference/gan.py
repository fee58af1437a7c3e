"""Local Back-Propagation with GAN cells, all in memory at once.

Written from the LBP paper (Applied Sciences 15(15) 8207) in plain PyTorch, to compare the machine
with. The generator is a dense autoencoder that is fed noise; its encoder, fed clean inputs, makes the
latents. The schedules are those of dense autoencoders, the classifier too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference.lbp import Classifier, separate, sequence
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm, linear

__all__ = ["Cell", "Classifier", "Noise", "separate", "sequence"]

#: Gaussian numbers shaped as the inputs, for (cell, epoch, step).
Noise = Callable[[int, int, int, Tensor], Tensor]


class Cell:
    """Generator W [n, d], b [n], V [d, n], c [d]; discriminator U [n, d], u [n], w [1, n], s [1]."""

    def __init__(
        self,
        index: int,
        generator: list[Tensor],
        discriminator: list[Tensor],
        lr: float,
        weight_decay: float,
        noise: Noise,
    ):
        self.index, self.noise = index, noise
        self.generator = [value.clone().requires_grad_() for value in generator]
        self.discriminator = [value.clone().requires_grad_() for value in discriminator]
        self.optimizers = [
            torch.optim.AdamW(values, lr=lr, weight_decay=weight_decay, fused=True)
            for values in (self.discriminator, self.generator)
        ]

    def encode(self, x: Tensor) -> Tensor:
        w, b, _, _ = self.generator
        x = x.flatten(1)
        return linear(layer_norm(x, x.shape[1:]), w, b).relu()

    def generate(self, nu: Tensor) -> Tensor:
        _, _, v, c = self.generator
        return linear(self.encode(nu), v, c).relu()

    def judge(self, x: Tensor) -> Tensor:
        """How real the discriminator finds each row: logits [B, 1]."""
        u, bias, w, s = self.discriminator
        return linear(linear(x, u, bias).relu(), w, s)

    def step(self, x: Tensor, epoch: int, number: int) -> Tensor:
        """The discriminator's step, then the generator's; the clean inputs' latents from before both."""
        clean = self.encode(x).detach()
        nu = self.noise(self.index, epoch, number, x)
        of_discriminator, of_generator = self.optimizers

        loss = _named(self.judge(x.flatten(1)), 1.0) + _named(self.judge(self.generate(nu).detach()), 0.0)
        of_discriminator.zero_grad()
        (loss / len(x)).backward()
        of_discriminator.step()

        loss = _named(self.judge(self.generate(nu)), 1.0)
        of_generator.zero_grad()
        (loss / len(x)).backward(inputs=self.generator)
        of_generator.step()
        return clean


def _named(logits: Tensor, truth: float) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth), reduction="sum")
