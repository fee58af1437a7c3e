"""Mono-Forward: each cell learns to name the class through a projection of its own.

James Gong, Bruce Li, Waleed Abdulla: Mono-Forward: Backpropagation-Free Algorithm for Efficient
Neural Network Training Harnessing Local Errors, 2025, https://arxiv.org/abs/2501.09238

For a cell with activations a = ReLU(x W) and a learned projection M [C, n]:

    G = a M^T                                  (eq. 5, "goodness" of each class)
    L = -sum_c y_c log softmax(G)_c            (eq. 6)

W and M follow the gradient of L (eqs. 7, 8); nothing flows to the previous cell. Under the sequence
schedule the a that is emitted is the one computed before the update (Algorithm 1). For convolutional cells
M acts on the flattened, pooled map; of a transformer's tokens it reads what the net says. Classes are
read off from the sum of all cells' G ("FF prediction") or from the last cell's alone ("BP prediction").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgetrain.objectives.base import Batch, Defaults, Node, Step, Streams
from edgetrain.objectives.statistic import StatisticObjective


class MonoForward(StatisticObjective):
    """Cross-entropy on a learned linear projection of the cell's activations."""

    name = "mf"
    citation = (
        "J. Gong, B. Li, W. Abdulla: Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural"
        " Network Training Harnessing Local Errors. arXiv:2501.09238, 2025."
    )
    needs = "labels; any net"
    net_defaults: ClassVar[Mapping[str, str]] = {"bias": "0", "pool": "avg"}
    defaults = Defaults(schedule="separate", optimizer="adam", lr=1e-3)
    vote = "sum"
    tile_axes: ClassVar[Mapping[str, int]] = {"weight": 1}

    def head(self, node: Node) -> nn.Module:
        """The projection M: a linear map [n] -> [C] without bias."""
        return nn.Linear(self.width(node.shape), self.classes, bias=False)

    def statistic(
        self, cell: nn.Module, head: Any, streams: Streams, units: int | None = None
    ) -> tuple[Tensor, Streams]:
        """The goodness G of each class, [B, C]."""
        a = cell(streams["x"])
        return head(self.vector(a)), {"x": a}

    def loss_from(self, statistic: Tensor, head: Any, batch: Batch) -> Step:
        """Summed cross-entropy of softmax(G)."""
        return Step(cross_entropy(statistic, batch.y, reduction="sum"), None, statistic.detach())

    def scores_from(self, statistic: Tensor) -> Tensor:
        """The goodness G of each class."""
        return statistic
