"""Local Back-Propagation: each cell is a small autoencoder; a classifier reads all cells' latents.

The Local Back-Propagation (LBP) paper, Applied Sciences 15(15) 8207, 2025,
https://www.mdpi.com/2076-3417/15/15/8207

One cell, with input x and its decoder as the head:

    x' = x (AE)    or    x' = x + 0.2 eps, eps ~ N(0, 1) (DAE)
    u  = LayerNorm(x')                      (the cell's ``prenorm``, without parameters)
    z  = ReLU(u W + b),   r = ReLU(z V + c)
    L  = mean over the elements of (r - x)^2

Open in the paper, our choices: the noise of "ratio 0.2" is Gaussian with standard deviation 0.2; the
target is the clean, un-normalised input (a ReLU decoder cannot produce LayerNorm's negatives). Under
the sequence schedule the DAE hands on the clean input's latents, from the weights before the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn

from edgetrain.objectives.base import Batch, Defaults, Node, Objective, Step

_CITATION = "Local Back-Propagation (LBP). Applied Sciences 15(15), article 8207, 2025."


class AutoencoderCells(Objective):
    """Each cell reconstructs its input through a dense decoder."""

    name = "lbp-ae"
    citation = _CITATION
    needs = "labels for the classifier only; inputs that are not negative"
    net_defaults: ClassVar[Mapping[str, str]] = {"bias": "1", "prenorm": "layer", "pool": "max"}
    defaults = Defaults(
        schedule="separate", optimizer="adamw", lr=1e-3, weight_decay=1e-4, classifier_weight_decay=1e-4
    )
    vote = "trained"
    nonnegative_input = True
    noise: ClassVar[float] = 0.0

    def head(self, node: Node) -> nn.Module:
        """The decoder: a linear map [n] -> [inputs] with bias, rectified."""
        assert node.parent is not None
        return nn.Sequential(nn.Linear(prod(node.shape), prod(node.parent.shape)), nn.ReLU(inplace=True))

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """Sum over samples of the mean squared error of the reconstruction."""
        x = batch.streams["x"]
        z = cell(self._corrupted(x, batch))
        target = x.flatten(1)
        total = (head(z.flatten(1)) - target).square().sum() / target.shape[1]
        return Step(total, None if self.noise else {"x": z.detach()})

    def _corrupted(self, x: Tensor, batch: Batch) -> Tensor:
        return x + self.noise * batch.draws.normal("noise", x) if self.noise else x


class DenoisingAutoencoderCells(AutoencoderCells):
    """Each cell reconstructs its clean input from a noisy one."""

    name = "lbp-dae"
    noise = 0.2
