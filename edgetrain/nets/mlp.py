"""Multi-layer perceptrons: ``mlp:1000x2``, ``mlp:512,256``, ``mlp:1024/5`` (halves four times)."""

from __future__ import annotations

import re
from math import prod

from edgetrain.errors import InputError
from edgetrain.nets.base import MOST_CELLS, MOST_UNITS, CellRecipe, Options
from edgetrain.nets.layers import dense, drop_rate, options_at

EXAMPLE = "mlp:1000x2, mlp:512,256 or mlp:1024/5"
_NUMBER = "[1-9][0-9]{0,17}"


def widths(text: str) -> list[int]:
    """``"1000x2"`` -> [1000, 1000]; ``"512,256"`` -> [512, 256]; ``"1024/3"`` -> [1024, 512, 256].

    Halving stops at 1 and then keeps the width (the LBP paper: latents halve until they cannot).

    Raises:
        ValueError: none of the three forms, or more cells or units than a net may have; it says which.
    """
    if match := re.fullmatch(rf"({_NUMBER})([x/])({_NUMBER})", text):
        width, depth = int(match[1]), _bounded(int(match[3]), MOST_CELLS, "cells")
        found = [width] * depth if match[2] == "x" else [max(1, width >> step) for step in range(depth)]
    elif re.fullmatch(rf"{_NUMBER}(,{_NUMBER})*", text):
        _bounded(text.count(",") + 1, MOST_CELLS, "cells")
        found = [int(width) for width in text.split(",")]
    else:
        raise ValueError("")
    _bounded(max(found), MOST_UNITS, "units in a cell")
    return found


def read_widths(spec: str, example: str) -> list[int]:
    """The widths behind the colon of a spec.

    Raises:
        InputError: they cannot be read, or there are too many; ``example`` shows how to write them.
    """
    try:
        return widths(spec.partition(":")[2])
    except ValueError as error:
        raise InputError(f"net {spec!r}: {str(error) or f'expected {example}'}") from None


def _bounded(found: int, most: int, what: str) -> int:
    if found > most:
        raise ValueError(f"{found} {what}; expected at most {most} {what}")
    return found


def cells(text: str, in_shape: tuple[int, ...], options: Options, first: int = 0) -> list[CellRecipe]:
    """The recipes of an MLP.

    Args:
        text: what follows ``mlp:``.
        in_shape: of one sample that the MLP reads.
        options: of the net.
        first: cells that stand before the MLP in the net.

    Raises:
        InputError: the widths cannot be read, or there are too many.
    """
    recipes: list[CellRecipe] = []
    shape = in_shape
    for index, width in enumerate(read_widths(f"mlp:{text}", EXAMPLE), first):
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
