"""Multi-layer perceptrons: ``mlp:1000x2``, ``mlp:512,256``, ``mlp:1024/5`` (halves four times)."""

from __future__ import annotations

import re
from math import prod

from edgetrain.errors import InputError
from edgetrain.nets.base import CellRecipe, Options
from edgetrain.nets.layers import dense, drop_rate, options_at

EXAMPLE = "mlp:1000x2, mlp:512,256 or mlp:1024/5"


def widths(text: str) -> list[int]:
    """``"1000x2"`` -> [1000, 1000]; ``"512,256"`` -> [512, 256]; ``"1024/3"`` -> [1024, 512, 256].

    Halving stops at 1 and then keeps the width (the LBP paper: latents halve until they cannot).

    Raises:
        ValueError: none of the three forms.
    """
    if match := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,5})", text):
        return [int(match[1])] * int(match[2])
    if match := re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,5})", text):
        return [max(1, int(match[1]) >> step) for step in range(int(match[2]))]
    if re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
        return [int(width) for width in text.split(",")]
    raise ValueError(text)


def cells(text: str, in_shape: tuple[int, ...], options: Options, first: int = 0) -> list[CellRecipe]:
    """The recipes of an MLP.

    Args:
        text: what follows ``mlp:``.
        in_shape: of one sample that the MLP reads.
        options: of the net.
        first: cells that stand before the MLP in the net.

    Raises:
        InputError: the widths cannot be read.
    """
    spec = f"mlp:{text}"
    try:
        units = widths(text)
    except ValueError:
        raise InputError(f"net {spec!r}: expected {EXAMPLE}") from None
    recipes: list[CellRecipe] = []
    shape = in_shape
    for index, width in enumerate(units, first):
        recipes.append(cell(shape, width, options_at(index, options)))
        shape = (width,)
    return recipes


def cell(in_shape: tuple[int, ...], width: int, options: Options) -> CellRecipe:
    """The recipe of one dense layer."""
    return CellRecipe(
        name=f"linear {prod(in_shape)}-{width}",
        in_shape=in_shape,
        out_shape=(width,),
        build=lambda: dense(in_shape, width, options),
        signature=("dense", in_shape, width, tuple(sorted(options.items()))),
        draws=drop_rate(options) > 0,
        couples_batch=options["norm"] == "batch",
        narrower=lambda units: cell(in_shape, units, options),
    )
