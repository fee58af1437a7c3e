"""Locally connected MLPs: ``lcmlp:4,8,16``, patches of 4x4, 8x8 and 16x16 (MF paper, Table 1).

Every output pixel has weights of its own for the patch around it. Output maps have the size and the
channels of the input; nothing is pooled.

Legend: B rows of a micro-batch, C channels, H height, W width, k side of a patch.
"""

from __future__ import annotations

from collections import OrderedDict
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from edgetrain.errors import InputError
from edgetrain.nets.base import CellRecipe, Options
from edgetrain.nets.layers import Layer, activation, check_images, drop_rate, options_at, prenorm
from edgetrain.nets.mlp import read_widths

EXAMPLE = "lcmlp:4,8,16"


class LocallyConnected(nn.Module):
    """A convolution of stride 1 and "same" size whose weights are not tied between pixels.

    An even patch reaches one pixel further down and to the right: (k - 1) // 2 before, k // 2 after.

    Args:
        shape: (C, H, W) of a sample.
        channels: of the output.
        patch: side of a patch, k.
        bias: whether each output has one.
    """

    def __init__(self, shape: tuple[int, ...], channels: int, patch: int, bias: bool = True):
        super().__init__()
        inputs, height, width = shape
        fan_in = inputs * patch * patch
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(height * width, fan_in, channels))
        self.bias = nn.Parameter(torch.empty(channels, height, width)) if bias else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / sqrt(fan_in), 1 / sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels, H, W]."""
        patches = self._patches(x)  # [H * W, B, C * k * k]
        if self.bias is None:
            out = torch.bmm(patches, self.weight)
        else:
            out = torch.baddbmm(self.bias.flatten(1).T.unsqueeze(1), patches, self.weight)
        return out.permute(1, 2, 0).reshape(len(x), -1, *x.shape[2:])

    def _patches(self, x: Tensor) -> Tensor:
        """The patch around each pixel, [H * W, B, C * k * k]; made in one copy, ready to be multiplied."""
        before, after = (self.patch - 1) // 2, self.patch // 2
        padded = pad(x, (before, after, before, after))
        views = padded.unfold(2, self.patch, 1).unfold(3, self.patch, 1)  # [B, C, H, W, k, k]
        return views.permute(2, 3, 0, 1, 4, 5).reshape(self.weight.shape[0], len(x), self.weight.shape[1])

    def extra_repr(self) -> str:
        """What the weights do not say."""
        return f"patch={self.patch}, weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


def local(in_shape: tuple[int, ...], patch: int, options: Options) -> Layer:
    """[B, C, H, W] -> [B, C, H, W]: normalise the input, multiply patches, normalise, rectify."""
    parts = prenorm(in_shape, options)
    parts.append(("local", LocallyConnected(in_shape, in_shape[0], patch, options["bias"] == "1")))
    if options["norm"] == "batch":
        parts.append(("norm", nn.BatchNorm2d(in_shape[0])))
    return Layer(OrderedDict(parts + activation(options)))


def cells(text: str, in_shape: tuple[int, ...], options: Options) -> list[CellRecipe]:
    """The recipes of a locally connected MLP; ``text`` is what follows ``lcmlp:``.

    Raises:
        InputError: the patches cannot be read or are too large, or the data are no images.
    """
    spec = f"lcmlp:{text}"
    patches = read_widths(spec, EXAMPLE)
    check_images(spec, in_shape)
    limit = 2 * min(in_shape[1:])
    if max(patches) > limit:
        raise InputError(
            f"net {spec!r}: patches of {max(patches)} on images of {in_shape[1]}x{in_shape[2]};"
            f" expected at most {limit}"
        )
    return [cell(in_shape, patch, options_at(index, options)) for index, patch in enumerate(patches)]


def cell(in_shape: tuple[int, ...], patch: int, options: Options) -> CellRecipe:
    """The recipe of one locally connected layer."""
    return CellRecipe(
        name=f"local {patch}x{patch}",
        in_shape=in_shape,
        out_shape=in_shape,
        build=lambda: local(in_shape, patch, options),
        signature=("local", in_shape, patch, tuple(sorted(options.items()))),
        draws=drop_rate(options) > 0,
        couples_batch=options["norm"] == "batch",
    )
