"""Convolutional nets: ``cnn:64,128,256,512``, each cell a 3x3 convolution and a 2x2 pooling (MF paper)."""

from __future__ import annotations

from edgetrain.errors import InputError
from edgetrain.nets.base import CellRecipe, Options
from edgetrain.nets.layers import check_images, convolution, convolved, drop_rate, options_at
from edgetrain.nets.mlp import read_widths

EXAMPLE = "cnn:64,128,256,512"


def cells(text: str, in_shape: tuple[int, ...], options: Options) -> list[CellRecipe]:
    """The recipes of a CNN; ``text`` is what follows ``cnn:``.

    Raises:
        InputError: the channels cannot be read, the data are no images, or pooling runs out of pixels.
    """
    spec = f"cnn:{text}"
    channels = read_widths(spec, EXAMPLE)
    check_images(spec, in_shape)
    recipes: list[CellRecipe] = []
    shape: tuple[int, ...] = in_shape
    for index, count in enumerate(channels):
        if min(shape[1:]) < 2:
            raise InputError(
                f"net {spec!r}: images of {in_shape[1]}x{in_shape[2]} can be halved {index} times,"
                f" not {len(channels)}: use at most {index} cells"
            )
        recipes.append(cell(shape, count, options_at(index, options)))
        shape = recipes[-1].out_shape
    return recipes


def cell(in_shape: tuple[int, ...], channels: int, options: Options, pooled: bool = True) -> CellRecipe:
    """The recipe of one convolution, with the pooling that follows it if ``pooled``."""
    body_shape = convolved(in_shape, channels, options)
    halved = (channels, body_shape[1] // 2, body_shape[2] // 2)
    return CellRecipe(
        name=f"conv {in_shape[0]}-{channels}",
        in_shape=in_shape,
        out_shape=halved if pooled else (channels, *in_shape[1:]),
        build=lambda: convolution(in_shape, channels, options, pooled),
        signature=("convolution", in_shape, channels, pooled, tuple(sorted(options.items()))),
        draws=drop_rate(options) > 0,
        couples_batch=options["norm"] == "batch",
        body_shape=body_shape if pooled else None,
        channels_last=True,
    )
