"""Backpropagation end to end in plain PyTorch, to compare the machine's baseline with."""

from __future__ import annotations

from itertools import pairwise

import torch
from reference.batches import shuffled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Network:
    """Linear layers with ReLU between them; the last one classifies."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None], lr: float):
        self.layers = [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        rectified = [part for layer, _ in pairwise(self.layers) for part in (layer, nn.ReLU())]
        self.whole = nn.Sequential(nn.Flatten(), *rectified, self.layers[-1])
        self.optimizer = torch.optim.Adam(self.whole.parameters(), lr=lr, fused=True)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    layer.bias = None if bias is None else nn.Parameter(bias.clone())
    return layer


def train(network: Network, x: Tensor, y: Tensor, seed: int, epochs: int, size: int) -> None:
    for epoch in range(epochs):
        for batch in shuffled(seed, epoch, len(x), size):
            network.optimizer.zero_grad()
            loss = cross_entropy(network.whole(x[batch]), y[batch], reduction="sum")
            (loss / len(batch)).backward()
            network.optimizer.step()
