"""VGG-like nets: ``vgg8b``, ``vgg11b``, ``vgg11``, and with other widths ``vgg8b:0.25``, ``vgg11b:3``.

Arild Noekland, Lars Hiller Eidnes: Training Neural Networks with Local Error Signals, 2019,
https://arxiv.org/abs/1901.06656 (VGG8B and VGG11B)

Stochastic Layer-wise Learning (SLL), 2025, https://arxiv.org/abs/2505.05181, A.4.4 (VGG11, without a
dense layer). The text of that table has lost its column of data sets; which of its rows is "the" VGG11
is our choice.

One cell per 3x3 convolution, with the pooling that follows it, and one for the dense layer. The number
after the colon multiplies the channels of the convolutions, not the dense layer's 1024 (so VGG11B (3x)
has the first paper's 91M parameters). On images too small for all poolings, those that would leave
nothing are left out.
"""

from __future__ import annotations

import re

from edgetrain.errors import InputError
from edgetrain.nets import cnn, mlp
from edgetrain.nets.base import CellRecipe, Options
from edgetrain.nets.layers import check_images, options_at

EXAMPLE = "vgg8b"
_POOL = 0
_CHANNELS: dict[str, tuple[int, ...]] = {
    "vgg8b": (128, 256, _POOL, 256, 512, _POOL, 512, _POOL, 512, _POOL),
    "vgg11b": (128, 128, 128, 256, _POOL, 256, 512, _POOL, 512, 512, _POOL, 512, _POOL),
    "vgg11": (64, _POOL, 128, _POOL, 256, 256, _POOL, 512, _POOL, 512, 1024),
}
_DENSE = {"vgg8b": 1024, "vgg11b": 1024}
FAMILIES = tuple(_CHANNELS)


def cells(family: str, text: str, in_shape: tuple[int, ...], options: Options) -> list[CellRecipe]:
    """The recipes of a VGG; ``text`` is what follows the colon, the multiplier of the channels.

    Raises:
        InputError: the multiplier cannot be read, or the data are no images.
    """
    spec = f"{family}:{text}" if text else family
    factor = _factor(spec, text)
    check_images(spec, in_shape)
    recipes: list[CellRecipe] = []
    shape, layers = in_shape, _CHANNELS[family]
    for count, following in zip(layers, (*layers[1:], None), strict=True):
        if count == _POOL:
            continue
        pooled = following == _POOL and min(shape[1:]) >= 2
        channels = max(1, round(count * factor))
        recipes.append(cnn.cell(shape, channels, options_at(len(recipes), options), pooled))
        shape = recipes[-1].out_shape
    if family in _DENSE:
        recipes.append(mlp.cell(shape, _DENSE[family], options))
    return recipes


def _factor(spec: str, text: str) -> float:
    factor = float(text) if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", text) else 0.0
    if text and not factor:
        raise InputError(f"net {spec!r}: expected a positive number after the colon, such as vgg8b:0.5")
    return factor or 1.0
