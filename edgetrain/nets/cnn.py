"""Convolutional nets: ``cnn:64,128,256,512``, each cell a 3x3 convolution and a 2x2 pooling (MF paper)."""

from __future__ import annotations

from edgetrain.errors import InputError
from edgetrain.nets.base import CellRecipe, Options
from edgetrain.nets.layers import convolution
from edgetrain.nets.mlp import widths

EXAMPLE = "cnn:64,128,256,512"


def cells(text: str, in_shape: tuple[int, ...], options: Options) -> list[CellRecipe]:
    """The recipes of a CNN; ``text`` is what follows ``cnn:``.

    Raises:
        InputError: the channels cannot be read, the data are no images, or pooling runs out of pixels.
    """
    try:
        channels = widths(text)
    except ValueError:
        raise InputError(f"net 'cnn:{text}': expected {EXAMPLE}") from None
    if len(in_shape) != 3:
        raise InputError(f"net 'cnn:{text}' needs images; the data have rows of shape {in_shape}: use mlp:")
    recipes: list[CellRecipe] = []
    shape: tuple[int, ...] = in_shape
    for count in channels:
        if min(shape[1:]) < 2:
            raise InputError(
                f"net 'cnn:{text}': images of {in_shape[1]}x{in_shape[2]} can be halved {len(recipes)} times,"
                f" not {len(channels)}: use at most {len(recipes)} cells"
            )
        recipes.append(_cell(shape, count, options))
        shape = recipes[-1].out_shape
    return recipes


def _cell(in_shape: tuple[int, ...], channels: int, options: Options) -> CellRecipe:
    return CellRecipe(
        name=f"conv {in_shape[0]}-{channels}",
        in_shape=in_shape,
        out_shape=(channels, in_shape[1] // 2, in_shape[2] // 2),
        build=lambda: convolution(in_shape, channels, options),
        signature=("convolution", in_shape, channels, tuple(sorted(options.items()))),
        couples_batch=options["norm"] == "batch",
    )
