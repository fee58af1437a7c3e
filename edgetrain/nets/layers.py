"""The parts that built-in cells share: normalisation of the input, weights, activation, pooling.

Options of a net spec (after ``;``, e.g. ``mlp:1000x2;bias=1;prenorm=layer``):

=========  =====================  =====================================================
option     values                 meaning
=========  =====================  =====================================================
bias       0, 1                   biases of dense and convolutional layers
pool       avg, max               pooling of convolutional cells
norm       none, batch            normalisation between the weights and the activation
prenorm    none, layer, rms       normalisation of each cell's input, without parameters;
                                  ``rms`` leaves out the first cell of the net
odd        floor, pad             what pooling does with odd sides: drop a row, or widen
                                  the map by one (7 -> 8 -> 4, LBP paper)
act        relu, leaky            activation; ``leaky`` has slope 0.01 below zero
dropout    a number 0 <= p < 1    share of activations that training sets to zero
tokens     flatten, class, mean   what is read off latents that are tokens
embedding  a whole number >= 1    width of the embedding that an MLP puts before tokens
=========  =====================  =====================================================

A transformer (``vit:``) has its own normalisation and activation: of these it reads bias, dropout
and tokens.

Legend: B rows of a micro-batch, C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from math import prod

from torch import Tensor, nn

from edgetrain.errors import InputError
from edgetrain.nets.base import Options

STANDARD: Options = {
    "bias": "1",
    "pool": "max",
    "norm": "none",
    "prenorm": "none",
    "odd": "floor",
    "act": "relu",
    "dropout": "0",
    "tokens": "flatten",
    "embedding": "50",
}
ALLOWED: dict[str, tuple[str, ...]] = {
    "bias": ("0", "1"),
    "pool": ("avg", "max"),
    "norm": ("none", "batch"),
    "prenorm": ("none", "layer", "rms"),
    "odd": ("floor", "pad"),
    "act": ("relu", "leaky"),
    "tokens": ("flatten", "class", "mean"),
}
_TAIL = ("dropout", "pool")
Parts = list[tuple[str, nn.Module]]


def _is_rate(text: str) -> bool:
    return re.fullmatch(r"0|0?\.[0-9]{1,9}", text) is not None


def _is_width(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,8}", text) is not None


_NUMBERS: dict[str, tuple[Callable[[str], bool], str]] = {
    "dropout": (_is_rate, "a number from 0 to below 1, such as 0.1"),
    "embedding": (_is_width, "a whole number from 1 on"),
}


def check_options(spec: str, options: Options) -> None:
    """Refuse what no layer understands.

    Raises:
        InputError: unknown option or value.
    """
    for key, value in options.items():
        if key not in STANDARD:
            raise InputError(f"net {spec!r}: unknown option {key!r}; known: {', '.join(STANDARD)}")
        if key in ALLOWED and value not in ALLOWED[key]:
            raise InputError(f"net {spec!r}: {key}={value!r}; expected one of {', '.join(ALLOWED[key])}")
        if key in _NUMBERS and not _NUMBERS[key][0](value):
            raise InputError(f"net {spec!r}: {key}={value!r}; expected {_NUMBERS[key][1]}")


def check_images(spec: str, in_shape: tuple[int, ...]) -> None:
    """Refuse data without channels, height and width.

    Raises:
        InputError: samples are no images.
    """
    if len(in_shape) != 3:
        raise InputError(f"net {spec!r} needs images; the data have rows of shape {in_shape}: use mlp:")


def options_at(index: int, options: Options) -> Options:
    """Options of cell ``index`` of a net: the first one's input keeps its length (no ``prenorm=rms``)."""
    if index == 0 and options["prenorm"] == "rms":
        return {**options, "prenorm": "none"}
    return options


def drop_rate(options: Options) -> float:
    """The share of activations that training sets to zero."""
    return float(options["dropout"])


class Layer(nn.Sequential):
    """A cell's parts in order, with the place marked where activations leave for the next cell."""

    def body(self, x: Tensor) -> Tensor:
        """[B, *in_shape] -> [B, *body_shape]: everything up to and including the activation."""
        for name, part in self.named_children():
            if name not in _TAIL:
                x = part(x)
        return x

    def tail(self, x: Tensor) -> Tensor:
        """[B, *body_shape] -> [B, *out_shape]: dropout and pooling, on the way to the next cell."""
        for name, part in self.named_children():
            if name in _TAIL:
                x = part(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[B, *in_shape] -> [B, *out_shape]."""
        return self.tail(self.body(x))


def dense(in_shape: tuple[int, ...], units: int, options: Options) -> Layer:
    """[B, *in_shape] -> [B, units]: flatten, normalise the input, multiply, normalise, rectify."""
    features = prod(in_shape)
    parts: Parts = [("flatten", nn.Flatten())] if len(in_shape) > 1 else []
    parts += prenorm((features,), options)
    parts.append(("linear", nn.Linear(features, units, bias=options["bias"] == "1")))
    if options["norm"] == "batch":
        parts.append(("norm", nn.BatchNorm1d(units)))
    return Layer(OrderedDict(parts + activation(options)))


def convolution(in_shape: tuple[int, ...], channels: int, options: Options, pooled: bool = True) -> Layer:
    """[B, C, H, W] -> [B, channels, ...]: 3x3 convolution, rectify, and pool 2x2 if ``pooled``."""
    kernel = _kernel(in_shape, options, pooled)
    parts = prenorm(in_shape, options)
    parts.append(("conv", nn.Conv2d(in_shape[0], channels, kernel, padding=1, bias=options["bias"] == "1")))
    if options["norm"] == "batch":
        parts.append(("norm", nn.BatchNorm2d(channels)))
    parts += activation(options)
    if pooled:
        parts.append(("pool", nn.AvgPool2d(2) if options["pool"] == "avg" else nn.MaxPool2d(2)))
    return Layer(OrderedDict(parts))


def convolved(in_shape: tuple[int, ...], channels: int, options: Options) -> tuple[int, int, int]:
    """Shape of one sample of a pooled convolution's activations, before pooling halves the sides."""
    height, width = _kernel(in_shape, options, pooled=True)
    return channels, in_shape[1] + 3 - height, in_shape[2] + 3 - width


def _kernel(in_shape: tuple[int, ...], options: Options, pooled: bool) -> tuple[int, int]:
    """Height and width of the kernel: 2 on sides that padding is to widen by one, else 3."""
    height, width = (2 if pooled and options["odd"] == "pad" and side % 2 else 3 for side in in_shape[1:])
    return height, width


def prenorm(shape: tuple[int, ...], options: Options) -> Parts:
    """Normalisation of an input [B, *shape], each sample for itself."""
    if options["prenorm"] == "layer":
        return [("prenorm", nn.LayerNorm(list(shape), elementwise_affine=False))]
    if options["prenorm"] == "rms":
        return [("prenorm", nn.RMSNorm(list(shape), eps=1e-8, elementwise_affine=False))]
    return []


def activation(options: Options) -> Parts:
    """The activation, and dropout after it if there is any."""
    act = nn.LeakyReLU(0.01, inplace=True) if options["act"] == "leaky" else nn.ReLU(inplace=True)
    rate = drop_rate(options)
    return [("act", act), ("dropout", nn.Dropout(rate))] if rate else [("act", act)]
