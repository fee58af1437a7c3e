"""Token ids to numbers: the mean of a learned vector for each token, the cell before an MLP on text.

Legend: B rows of a micro-batch, L tokens in a row, D width of a token's vector.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from edgetrain.nets.base import CellRecipe, Options
from edgetrain.nets.layers import Layer

PADDING = 0  # the token id that stands for no token


def mean_embedding(vocabulary: int, width: int) -> Layer:
    """Token ids [B, L] -> [B, D]: the mean over the tokens that are not padding, zeros if there are none.

    ``nn.EmbeddingBag`` has the weights and the first values of ``nn.Embedding`` and sums up row by row,
    so that [B, L, D] is never there.
    """
    bag = nn.EmbeddingBag(vocabulary, width, mode="mean", padding_idx=PADDING)
    return Layer(OrderedDict([("embedding", bag)]))


def cell(in_shape: tuple[int, ...], vocabulary: int, options: Options) -> CellRecipe:
    """The recipe of the embedding of rows of ``in_shape``, ``(L,)``."""
    width = int(options["embedding"])
    return CellRecipe(
        name=f"embedding {vocabulary}-{width}",
        in_shape=in_shape,
        out_shape=(width,),
        build=lambda: mean_embedding(vocabulary, width),
        signature=("embedding", in_shape, vocabulary, width),
    )
