"""Stochastic Layer-wise Learning: cross-entropy through a fixed random projection, and peace with the parent.

Stochastic Layer-wise Learning (SLL), 2025, https://arxiv.org/abs/2505.05181; a reconstruction, as the
text that we have lost its formulas. For a cell with activations a [B, n], its parent's latents x and
fixed random projections R [n, C] and R' [d, C] (the parent's own):

    v = a (R * mask) / (1 - p)            mask: multiplicative dropout on R's entries, fresh each step
    q = softmax(v),   w = stop-gradient of softmax(x R')
    L = CE(q, y) - beta log sum_c sqrt(w_c q_c)          (the Bhattacharyya distance of w and q)

R is drawn from (seed, cell) and never stored. Classes are read off from the last cell's a R; a linear
classifier on the last latents is trained if ``--classifier-epochs`` asks for it.

Open in the text, our choices: beta = 1, p = 0, entries of R are N(0, 1/n), the first cell has a
parent too (the network's input, with a projection of its own), m = C. On convolutional cells R acts on
the whole flattened map: 4 n C bytes of the device budget.

SLL+ is the same rule for Vision Transformers: cells of one or more blocks, backpropagation inside a cell,
and the class token or the mean of the tokens as a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from edgetrain.errors import InputError
from edgetrain.objectives.base import Batch, Constants, Defaults, Input, Node, Step, Streams
from edgetrain.objectives.statistic import StatisticObjective


class StochasticLayerwise(StatisticObjective):
    """Cross-entropy and Bhattacharyya distance through fixed random projections."""

    name = "sll"
    citation = "Stochastic Layer-wise Learning (SLL). arXiv:2505.05181, 2025."
    needs = "labels; any net"
    net_defaults: ClassVar[Mapping[str, str]] = {"bias": "1", "pool": "max"}
    constants: Constants = MappingProxyType({"beta": 1.0, "dropout": 0.0})
    shares = frozenset({"dropout"})
    defaults = Defaults(schedule="sequence", optimizer="adamax", lr=1e-3)
    vote = "last"
    classifier = "last"

    def head(self, node: Node) -> nn.Module:
        """The cell's own projection and its parent's."""
        return _Fixed(own=self._projection(node), parent=self._projection(node.parent))

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """See ``StatisticObjective.loss``; a fresh mask may be on the projection."""
        if self.constants["dropout"]:
            head = _Fixed(own=self._masked(head.own, batch), parent=head.parent)
        return super().loss(phase, cell, head, batch)

    def statistic(
        self, cell: nn.Module, head: Any, streams: Streams, units: int | None = None
    ) -> tuple[Tensor, Streams]:
        """The projected logits v = a R, [B, C]."""
        a = cell(streams["x"])
        return self.vector(a) @ head.own, {"x": a}

    def loss_from(self, statistic: Tensor, head: Any, batch: Batch) -> Step:
        """Summed cross-entropy and distance from the parent's distribution."""
        total = cross_entropy(statistic, batch.y, reduction="sum")
        x = batch.streams["x"]
        if self.constants["beta"] and x.is_floating_point():  # token ids have no distribution
            total = total + self.constants["beta"] * self._distance(statistic, x, head.parent)
        return Step(total, None, statistic.detach())

    def scores_from(self, statistic: Tensor) -> Tensor:
        """The projected logits."""
        return statistic

    def tileable(self, node: Node) -> bool:
        """See ``StatisticObjective.tileable``; a mask on the projection is drawn for the whole cell."""
        return super().tileable(node) and not self.constants["dropout"]

    def tile_head(self, node: Node, tile: Node, units: slice) -> nn.Module:
        """The rows of the projection that are the units'."""
        return _Fixed(own=self._projection(node)[units])

    def fixed_head(self, node: Node) -> nn.Module:
        """The parent's projection."""
        return _Fixed(parent=self._projection(node.parent))

    def _projection(self, node: Node | Input) -> Tensor:
        inputs = self.width(node.shape)
        return node.normal("projection", (inputs, self.classes), inputs**-0.5)

    def _masked(self, projection: Tensor, batch: Batch) -> Tensor:
        dropped = self.constants["dropout"]
        return projection * batch.draws.keep("mask", projection, 1 - dropped) / (1 - dropped)

    def _distance(self, v: Tensor, x: Tensor, projection: Tensor) -> Tensor:
        """Summed -log sum_c sqrt(w_c q_c), from logarithms."""
        with torch.no_grad():
            log_w = log_softmax(self.vector(x) @ projection, 1)
        return -torch.logsumexp((log_w + log_softmax(v, 1)) / 2, 1).sum()


class StochasticLayerwiseBlocks(StochasticLayerwise):
    """SLL between cells of transformer blocks."""

    name = "sll+"
    needs = "labels; images; a vit: net, or cells of your own that emit tokens [T, D]"
    default_net = "vit:depth=4,width=96,heads=4,patch=4"
    defaults = Defaults(schedule="sequence", optimizer="adamw", lr=1e-3)
    takes_tokens = False

    def check(self, cells: Sequence[Node]) -> None:
        """See ``Objective.check``: every cell emits tokens."""
        for node in cells:
            if len(node.shape) != 2:
                raise InputError(
                    f"sll+ needs cells that emit tokens; cell {node.index + 1} emits {node.shape}: use"
                    " --net vit:depth=4,width=96,heads=4,patch=4, or --method sll"
                )


class _Fixed(nn.Module):
    """Fixed matrices that are made again from their key instead of stored: ``own`` and ``parent``."""

    own: Tensor
    parent: Tensor

    def __init__(self, **matrices: Tensor):
        super().__init__()
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix, persistent=False)
