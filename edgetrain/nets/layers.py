"""The parts that built-in cells share: normalisation of the input, weights, activation, pooling.

Options of a net spec (after ``;``, e.g. ``mlp:1000x2;bias=1;prenorm=layer``):

=========  =====================  =====================================================
option     values                 meaning
=========  =====================  =====================================================
bias       0, 1                   biases of dense and convolutional layers
pool       avg, max               pooling of convolutional cells
norm       none, batch            normalisation between the weights and the activation
prenorm    none, layer            normalisation of each cell's input, without parameters
=========  =====================  =====================================================
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod

from torch import nn

from edgetrain.errors import InputError
from edgetrain.nets.base import Options

ALLOWED: dict[str, tuple[str, ...]] = {
    "bias": ("0", "1"),
    "pool": ("avg", "max"),
    "norm": ("none", "batch"),
    "prenorm": ("none", "layer"),
}
STANDARD: Options = {"bias": "1", "pool": "max", "norm": "none", "prenorm": "none"}


def check_options(spec: str, options: Options) -> None:
    """Refuse what no layer understands.

    Raises:
        InputError: unknown option or value.
    """
    for key, value in options.items():
        if key not in ALLOWED:
            raise InputError(f"net {spec!r}: unknown option {key!r}; known: {', '.join(ALLOWED)}")
        if value not in ALLOWED[key]:
            raise InputError(f"net {spec!r}: {key}={value!r}; expected one of {', '.join(ALLOWED[key])}")


def dense(in_shape: tuple[int, ...], units: int, options: Options) -> nn.Sequential:
    """[B, *in_shape] -> [B, units]: flatten, normalise the input, multiply, normalise, rectify."""
    features = prod(in_shape)
    parts: list[tuple[str, nn.Module]] = []
    if len(in_shape) > 1:
        parts.append(("flatten", nn.Flatten()))
    if options["prenorm"] == "layer":
        parts.append(("prenorm", nn.LayerNorm(features, elementwise_affine=False)))
    parts.append(("linear", nn.Linear(features, units, bias=options["bias"] == "1")))
    if options["norm"] == "batch":
        parts.append(("norm", nn.BatchNorm1d(units)))
    parts.append(("act", nn.ReLU(inplace=True)))
    return nn.Sequential(OrderedDict(parts))


def convolution(in_shape: tuple[int, ...], channels: int, options: Options) -> nn.Sequential:
    """[B, C, H, W] -> [B, channels, H // 2, W // 2]: 3x3 convolution, rectify, pool 2x2."""
    parts: list[tuple[str, nn.Module]] = []
    if options["prenorm"] == "layer":
        parts.append(("prenorm", nn.LayerNorm(list(in_shape), elementwise_affine=False)))
    parts.append(("conv", nn.Conv2d(in_shape[0], channels, 3, padding=1, bias=options["bias"] == "1")))
    if options["norm"] == "batch":
        parts.append(("norm", nn.BatchNorm2d(channels)))
    parts.append(("act", nn.ReLU(inplace=True)))
    parts.append(("pool", nn.AvgPool2d(2) if options["pool"] == "avg" else nn.MaxPool2d(2)))
    return nn.Sequential(OrderedDict(parts))
