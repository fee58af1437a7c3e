"""Vision transformers: ``vit:depth=7,width=384,heads=12,patch=4``, optionally ``ratio=2`` and ``cell=1``.

Dosovitskiy et al.: An Image is Worth 16x16 Words, 2020, https://arxiv.org/abs/2010.11929. The first
cell cuts the image into patches, embeds them, adds learned positions (and a class token with the option
``tokens=class``) and holds the first block; every cell holds ``cell`` blocks, the last one maybe fewer.
Latents are tokens [T, D] whatever is read off them. Blocks are pre-norm, with GELU:

    x <- x + attention(LN(x)),   x <- x + mlp(LN(x))

Legend: B rows of a micro-batch, C channels, H height, W width, T tokens, D width, h heads.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from edgetrain.errors import InputError
from edgetrain.nets.base import MOST_CELLS, MOST_UNITS, CellRecipe, Options
from edgetrain.nets.layers import Layer, Parts, check_images, drop_rate

EXAMPLE = "vit:depth=7,width=384,heads=12,patch=4"
STANDARD: Options = {"tokens": "class"}
_REQUIRED = ("depth", "width", "heads", "patch")
_KEYS = (*_REQUIRED, "ratio", "cell")


@dataclass(frozen=True)
class Sizes:
    """What a spec says.

    Attributes:
        depth: blocks in all.
        width: numbers in a token, D.
        heads: of attention, h.
        patch: side of a patch in pixels.
        ratio: the hidden layer of a block's MLP is this many times wider than a token.
        cell: blocks in a cell.
    """

    depth: int
    width: int
    heads: int
    patch: int
    ratio: int = 2
    cell: int = 1


def read_sizes(text: str) -> Sizes:
    """``"depth=7,width=384,heads=12,patch=4"`` as sizes.

    Raises:
        InputError: a key is missing, unknown or given twice, or a value is not a whole number of at least 1.
    """
    spec, found = f"vit:{text}", dict[str, int]()
    for setting in text.split(","):
        match = re.fullmatch(r"([^=]*)=([1-9][0-9]{0,5})", setting)
        if match is None or match[1] in found:
            raise InputError(f"net {spec!r}: {setting!r}; expected each key once with a whole number, {EXAMPLE}")
        if match[1] not in _KEYS:
            raise InputError(f"net {spec!r}: unknown key {match[1]!r}; known: {', '.join(_KEYS)}")
        found[match[1]] = int(match[2])
    if missing := [key for key in _REQUIRED if key not in found]:
        raise InputError(f"net {spec!r}: {', '.join(missing)} missing; expected {EXAMPLE}")
    return Sizes(**found)


class PatchEmbedding(nn.Module):
    """Patches of an image as tokens, with learned positions and perhaps a class token in front.

    Args:
        shape: (C, H, W) of a sample.
        sizes: of the net.
        bias: whether the embedding of patches has one.
        class_token: whether there is one.
    """

    def __init__(self, shape: tuple[int, ...], sizes: Sizes, bias: bool, class_token: bool):
        super().__init__()
        patches = (shape[1] // sizes.patch) * (shape[2] // sizes.patch)
        self.conv = nn.Conv2d(shape[0], sizes.width, sizes.patch, stride=sizes.patch, bias=bias)
        self.positions = nn.Parameter(torch.empty(patches + class_token, sizes.width))
        self.class_token = nn.Parameter(torch.empty(1, sizes.width)) if class_token else None
        nn.init.normal_(self.positions, std=0.02)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, D]."""
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(x), 1, -1), tokens], 1)
        return tokens + self.positions  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention of ``heads`` heads.

    Args:
        width: numbers in a token, D.
        heads: h.
        bias: whether the linear maps have one.
    """

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.projection = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, h, T, D / h]
        mixed = scaled_dot_product_attention(*qkv.unbind())
        return self.projection(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        sizes: of the net.
        options: of the net; ``bias`` is about the linear maps, ``dropout`` about what is added to x.
    """

    def __init__(self, sizes: Sizes, options: Options):
        super().__init__()
        width, hidden, bias = sizes.width, sizes.ratio * sizes.width, options["bias"] == "1"
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, sizes.heads, bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, width, bias=bias))
        rate = drop_rate(options)
        self.dropout = nn.Dropout(rate) if rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


def cells(text: str, in_shape: tuple[int, ...], options: Options) -> list[CellRecipe]:
    """The recipes of a vision transformer; ``text`` is what follows ``vit:``.

    Raises:
        InputError: the sizes cannot be read or do not fit, or the data are no images.
    """
    spec, sizes = f"vit:{text}", read_sizes(text)
    check_images(spec, in_shape)
    if sizes.depth > MOST_CELLS or sizes.width * sizes.ratio > MOST_UNITS:
        raise InputError(
            f"net {spec!r}: expected at most {MOST_CELLS} blocks and a width times ratio of at most {MOST_UNITS}"
        )
    _, height, width = in_shape
    if sizes.width % sizes.heads:
        raise InputError(f"net {spec!r}: width {sizes.width} cannot be divided among {sizes.heads} heads")
    if height % sizes.patch or width % sizes.patch:
        raise InputError(f"net {spec!r}: images of {height}x{width} cannot be cut into patches of side {sizes.patch}")
    tokens = (height // sizes.patch) * (width // sizes.patch) + (options["tokens"] == "class")
    recipes, shape = [], in_shape
    for start in range(0, sizes.depth, sizes.cell):
        out_shape = (tokens, sizes.width)
        recipes.append(_cell(shape, out_shape, sizes, min(sizes.cell, sizes.depth - start), options))
        shape = out_shape
    return recipes


def _cell(
    in_shape: tuple[int, ...], out_shape: tuple[int, ...], sizes: Sizes, blocks: int, options: Options
) -> CellRecipe:
    patches = f"patches {sizes.patch}x{sizes.patch}, " if len(in_shape) == 3 else ""
    held = "block" if blocks == 1 else f"{blocks} blocks"
    return CellRecipe(
        name=f"{patches}{held} {out_shape[0]}x{out_shape[1]}",
        in_shape=in_shape,
        out_shape=out_shape,
        build=lambda: transformer(in_shape, sizes, blocks, options),
        signature=("transformer", in_shape, sizes, blocks, tuple(sorted(options.items()))),
        draws=drop_rate(options) > 0,
    )


def transformer(in_shape: tuple[int, ...], sizes: Sizes, blocks: int, options: Options) -> Layer:
    """[B, C, H, W] or [B, T, D] -> [B, T, D]: images become tokens first, then come the blocks."""
    parts: Parts = []
    if len(in_shape) == 3:
        embedding = PatchEmbedding(in_shape, sizes, options["bias"] == "1", options["tokens"] == "class")
        parts.append(("patches", embedding))
    parts += [(f"block{number}", Block(sizes, options)) for number in range(blocks)]
    return Layer(OrderedDict(parts))
