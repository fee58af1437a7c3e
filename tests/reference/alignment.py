"""Feedback alignment and direct feedback alignment, the chain rule written out by hand.

Plain PyTorch without autograd, to compare the machine with. The hidden layers are dense, or 3x3
convolutions followed by ReLU and 2x2 pooling; the last layer is dense and classifies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference.batches import shuffled
from torch import Tensor
from torch.nn.functional import (
    avg_pool2d,
    conv2d,
    conv_transpose2d,
    interpolate,
    linear,
    max_pool2d,
    max_unpool2d,
    one_hot,
    pad,
    unfold,
)


@dataclass
class Seen:
    """What a hidden layer met and made: its input, z before ReLU, and where the pooled maxima lay."""

    x: Tensor
    z: Tensor
    where: Tensor | None


class Network:
    """Layers W (dense [n, d] or convolution [n, d, 3, 3]) with biases; the last one classifies.

    Feedback alignment: ``feedback`` holds, for every layer but the first, a fixed B of its W's shape
    (the first one's, if given, is never used). Direct: for every hidden layer a fixed B [C, n], with n
    the number of values that the layer emits.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        feedback: list[Tensor],
        lr: float,
        direct: bool = False,
        pool: str = "max",
    ):
        self.direct, self.pool = direct, pool
        self.weights = [value.clone() for value in weights]
        self.biases = [None if value is None else value.clone() for value in biases]
        self.feedback = feedback if direct or len(feedback) == len(weights) else [weights[0], *feedback]
        learned = [value for value in (*self.weights, *self.biases) if value is not None]
        self.optimizer = torch.optim.Adam(learned, lr=lr, fused=True)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Seen]]:
        """The logits, and what each layer saw; of the classifier only the input."""
        seen = []
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            if weight.ndim == 2:
                x = x.flatten(1)
                seen.append(Seen(x, linear(x, weight, bias), None))
                x = seen[-1].z.relu()
            else:
                z = conv2d(x, weight, bias, padding=1)
                pooled, where = max_pool2d(z.relu(), 2, return_indices=True)
                seen.append(Seen(x, z, where))
                x = pooled if self.pool == "max" else avg_pool2d(z.relu(), 2)
        logits = linear(x.flatten(1), self.weights[-1], self.biases[-1])
        seen.append(Seen(x.flatten(1), logits, None))
        return logits, seen

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of Adam; the logits from before it."""
        logits, seen = self.forward(x)
        error = (logits.softmax(1) - one_hot(y, logits.shape[1])) / len(x)
        dz = error  # at the layer's z, from the last layer to the first
        last = len(self.weights) - 1
        for layer in range(last, -1, -1):
            if layer < last:
                da = error @ self.feedback[layer] if self.direct else _back(dz, self.feedback[layer + 1])
                dz = self._to_z(da, seen[layer])
            self._learn(layer, seen[layer].x, dz)
        self.optimizer.step()
        return logits

    def _to_z(self, da: Tensor, seen: Seen) -> Tensor:
        """From the gradient with respect to a hidden layer's output to that with respect to its z."""
        if seen.where is not None:
            da = da.reshape(seen.where.shape)  # a dense layer above read it flattened
            height, width = seen.z.shape[2:]
            if self.pool == "max":
                da = max_unpool2d(da, seen.where, 2, output_size=(height, width))
            else:  # rows and columns that filled no window got nothing
                da = interpolate(da / 4, scale_factor=2.0, mode="nearest")
                da = pad(da, (0, width % 2, 0, height % 2))
        return da * (seen.z > 0)

    def _learn(self, layer: int, x: Tensor, dz: Tensor) -> None:
        weight, bias = self.weights[layer], self.biases[layer]
        if weight.ndim == 2:
            weight.grad = dz.T @ x
        else:
            patches = unfold(x, 3, padding=1)  # [B, d 9, pixels]
            weight.grad = torch.einsum("bnp,bkp->nk", dz.flatten(2), patches).view_as(weight)
        if bias is not None:
            bias.grad = dz.sum(0) if dz.ndim == 2 else dz.sum((0, 2, 3))


def _back(dz: Tensor, b: Tensor) -> Tensor:
    """The gradient at a layer's input, with B in place of the layer's weights."""
    return dz @ b if b.ndim == 2 else conv_transpose2d(dz, b, padding=1)


def train(network: Network, x: Tensor, y: Tensor, seed: int, epochs: int, size: int) -> None:
    for epoch in range(epochs):
        for batch in shuffled(seed, epoch, len(x), size):
            network.step(x[batch], y[batch])
