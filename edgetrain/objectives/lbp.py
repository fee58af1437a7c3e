"""Local Back-Propagation: each cell is a small autoencoder; a classifier reads all cells' latents.

The Local Back-Propagation (LBP) paper, Applied Sciences 15(15) 8207, 2025,
https://www.mdpi.com/2076-3417/15/15/8207

One cell, with input x and its decoder as the head:

    x' = x (AE)    or    x' = x + 0.2 eps, eps ~ N(0, 1) (DAE)
    u  = LayerNorm(x')                      (the cell's ``prenorm``, without parameters)
    z  = ReLU(u W + b),   r = ReLU(z V + c)
    L  = mean over the elements of (r - x)^2

CAE: the cell is convolution, ReLU and 2x2 max pooling, the decoder a transposed convolution that
gives the input's size back: kernel 2, stride 2; where a side is odd (28 -> 14 -> 7 -> 4) the cell's
kernel is 2 with padding 1 (7 -> 8 -> 4) and the decoder's kernel is (side + 1) / 2 with stride 1
(4 -> 7), height and width each on its own.

GAN: the generator is the autoencoder fed with noise nu ~ N(0, 1) of the input's shape, the
discriminator D(x) = ReLU(x U + u) w + s. Two phases with an optimizer each:

    discriminator:  BCE(D(x), 1) + BCE(D(G(nu)), 0)
    generator:      BCE(D(G(nu)), 1)        (non-saturating; the same nu, the discriminator just updated)

Open in the paper, our choices: the noise of "ratio 0.2" is Gaussian with standard deviation 0.2; the
target is the clean, un-normalised input (a ReLU decoder cannot produce LayerNorm's negatives); noise
and losses of the GAN; its discriminator is as wide as the cell. Under the sequence schedule DAE and GAN
emit the clean input's latents, from the weights before the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from edgetrain.errors import InputError
from edgetrain.objectives.base import Batch, Constants, Defaults, Node, Phase, Step, Streams
from edgetrain.objectives.statistic import StatisticObjective


class AutoencoderCells(StatisticObjective):
    """Each cell reconstructs its input through a dense decoder."""

    name = "lbp-ae"
    citation = "Local Back-Propagation (LBP). Applied Sciences 15(15), article 8207, 2025."
    needs = "labels for the classifier only; inputs that are not negative"
    net_defaults: ClassVar[Mapping[str, str]] = {"bias": "1", "prenorm": "layer", "pool": "max"}
    defaults = Defaults(
        schedule="separate", optimizer="adamw", lr=1e-3, weight_decay=1e-4, classifier_weight_decay=1e-4
    )
    vote = "classifier"
    classifier = "all"
    nonnegative_input = True
    takes_tokens = False
    tile_axes: ClassVar[Mapping[str, int] | None] = {"0.weight": 1}

    def head(self, node: Node) -> nn.Module:
        """The decoder: a linear map [n] -> [inputs] with bias, rectified."""
        return _dense_decoder(node)

    def statistic(
        self, cell: nn.Module, head: Any, streams: Streams, units: int | None = None
    ) -> tuple[Tensor, Streams]:
        """The reconstruction before its rectification, [B, inputs]."""
        z = cell(streams["x"])
        return head[0](z.flatten(1)), {"x": z}

    def loss_from(self, statistic: Tensor, head: Any, batch: Batch) -> Step:
        """Sum over samples of the mean squared error of the reconstruction."""
        target = batch.streams["x"].flatten(1)
        return Step((torch.relu_(statistic) - target).square().sum() / target.shape[1])

    def read(self, cell: nn.Module, head: Any, streams: Streams) -> tuple[Streams, Tensor | None]:
        """See ``Objective.read``; cells have no vote, and the decoder is not needed."""
        return self.latent(cell, streams), None

    def tile_head(self, node: Node, tile: Node, units: slice) -> nn.Module:
        """The columns of the decoder that are the units'; the first tile has the bias."""
        inputs = prod(node.parent.shape)
        return nn.Sequential(nn.Linear(prod(tile.shape), inputs, bias=units.start == 0))


class DenoisingAutoencoderCells(AutoencoderCells):
    """Each cell reconstructs its clean input from a noisy one."""

    name = "lbp-dae"
    tile_axes = None  # emits the clean input's latents, which would need a third sweep
    constants: Constants = MappingProxyType({"noise": 0.2})

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """See ``StatisticObjective.loss``; the cell sees noise, the target is clean."""
        x = batch.streams["x"]
        seen = x + self.constants["noise"] * batch.draws.normal("noise", x)
        statistic, _ = self.statistic(cell, head, {"x": seen})
        return self.loss_from(statistic, head, batch)


class ConvolutionalAutoencoderCells(AutoencoderCells):
    """Each cell, a convolution with pooling, reconstructs its input through a transposed convolution."""

    name = "lbp-cae"
    tile_axes = None
    needs = "labels for the classifier only; images whose values are not negative; a pooling cnn: net"
    default_net = "cnn:64,128"
    net_defaults: ClassVar[Mapping[str, str]] = {"bias": "1", "prenorm": "layer", "pool": "max", "odd": "pad"}

    def check(self, cells: Sequence[Node]) -> None:
        """See ``Objective.check``: every cell halves an image."""
        for node in cells:
            sides = node.parent.shape[1:]
            if len(node.shape) != 3 or node.shape[1:] != tuple(-(-side // 2) for side in sides):
                raise InputError(
                    f"lbp-cae needs convolutional cells that halve images; cell {node.index + 1} takes"
                    f" {node.parent.shape} to {node.shape}: use --net cnn:64,128 (with odd=pad)"
                )

    def head(self, node: Node) -> nn.Module:
        """The decoder: a transposed convolution with bias that gives the input's size back, rectified."""
        sides = node.parent.shape[1:]
        kernel = tuple(2 if side % 2 == 0 else (side + 1) // 2 for side in sides)
        stride = tuple(2 if side % 2 == 0 else 1 for side in sides)
        back = nn.ConvTranspose2d(node.shape[0], node.parent.shape[0], kernel, stride)  # type: ignore[arg-type]
        return nn.Sequential(back, nn.ReLU(inplace=True))

    def statistic(
        self, cell: nn.Module, head: Any, streams: Streams, units: int | None = None
    ) -> tuple[Tensor, Streams]:
        """The reconstruction before its rectification, flattened."""
        z = cell(streams["x"])
        return head[0](z).flatten(1), {"x": z}


class GenerativeAdversarialCells(AutoencoderCells):
    """Each cell is the encoder of a generator that learns to fool a discriminator of its input."""

    name = "lbp-gan"
    tile_axes = None  # would need four sweeps
    defaults = Defaults(
        schedule="separate",
        optimizer="adamw",
        lr=1e-4,
        weight_decay=1e-4,
        classifier_lr=1e-2,
        classifier_weight_decay=1e-4,
    )
    phases = (
        Phase("discriminator", lambda name: name.startswith("head.discriminator")),
        Phase("generator", lambda name: not name.startswith("head.discriminator")),
    )

    def head(self, node: Node) -> nn.Module:
        """``decoder``, as the autoencoder's, and ``discriminator`` [inputs] -> [n] -> [1]."""
        inputs, units = prod(node.parent.shape), prod(node.shape)
        discriminator = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(inplace=True), nn.Linear(units, 1))
        return nn.ModuleDict({"decoder": _dense_decoder(node), "discriminator": discriminator})

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """Summed binary cross-entropies of one phase."""
        x = batch.streams["x"]
        noise = batch.draws.normal("noise", x)
        if phase == "generator":
            return Step(_told(head["discriminator"], self._made(cell, head, noise), 1.0))
        with torch.no_grad():
            made = self._made(cell, head, noise)
        real = _told(head["discriminator"], x.flatten(1), 1.0)
        return Step(real + _told(head["discriminator"], made, 0.0))

    def _made(self, cell: nn.Module, head: Any, noise: Tensor) -> Tensor:
        made: Tensor = head["decoder"](cell(noise).flatten(1))
        return made


def _dense_decoder(node: Node) -> nn.Module:
    return nn.Sequential(nn.Linear(prod(node.shape), prod(node.parent.shape)), nn.ReLU(inplace=True))


def _told(discriminator: nn.Module, x: Tensor, truth: float) -> Tensor:
    """Summed cross-entropy of the discriminator's verdict on rows [B, inputs]."""
    verdict = discriminator(x)  # [B, 1]
    return bce(verdict, torch.full_like(verdict, truth), reduction="sum")
