"""Local prediction and similarity matching (predsim).

Arild Noekland, Lars Hiller Eidnes: Training Neural Networks with Local Error Signals, 2019,
https://arxiv.org/abs/1901.06656

For a cell with activations h (before pooling), a prediction head and a learned map m of its own:

    L = (1 - beta) CE(head(pool(h)), y) + beta MSE(S(m(h)), S(Y)),   beta = 0.99

S is the matrix of cosine similarities between the samples of the batch, of mean-centred rows, clamped
to [-1, 1]. A convolutional map goes through m, a 3x3 convolution, and is then reduced to each channel's
standard deviation over the pixels; dense activations go through m, a linear map. The head reads the map
averaged down to at most 2048 numbers. The samples of a batch influence each other, so a batch cannot be
split. The latents are taken after dropout and pooling.

The paper's net has one more linear layer on top; here the last cell's own prediction is the vote.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, mse_loss, one_hot

from edgetrain.nets.layers import Layer
from edgetrain.objectives.base import Batch, Constants, Defaults, Node, Objective, Step, Streams

_LEAST = 1e-30  # of a centred row's squares: rows of equal numbers are like no other
_MOST_INPUTS = 2048  # of the prediction head (``dim_in_decoder``)


class PredictionAndSimilarity(Objective):
    """Local cross-entropy and similarity matching."""

    name = "predsim"
    citation = (
        "A. Noekland, L. H. Eidnes: Training Neural Networks with Local Error Signals. ICML 2019. arXiv:1901.06656."
    )
    needs = "labels; any net; a batch whole, as its samples are compared with each other"
    default_net = "mlp:1000x2"
    net_defaults: ClassVar[Mapping[str, str]] = {"bias": "1", "pool": "max", "norm": "batch", "act": "leaky"}
    constants: Constants = MappingProxyType({"beta": 0.99})
    shares = frozenset({"beta"})
    defaults = Defaults(schedule="sequence", optimizer="adam", lr=5e-4)
    vote = "last"
    couples_batch = True

    def head(self, node: Node) -> nn.Module:
        """``predict``, a linear classifier, and ``similarity``, the map m."""
        shape = node.recipe.body_shape or node.shape
        inputs = self._read(torch.empty(1, *shape, device="meta")).shape[1]
        predict = nn.Linear(inputs, self.classes)
        if len(shape) == 3:
            return nn.ModuleDict(
                {"predict": predict, "similarity": nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)}
            )
        width = self.width(shape)
        return nn.ModuleDict({"predict": predict, "similarity": nn.Linear(width, width, bias=False)})

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """The batch's loss times its size, because the machine divides by that."""
        h = _body(cell, batch.streams["x"])
        logits = head["predict"](self._read(h))
        mapped = head["similarity"](h if h.ndim == 4 else self.vector(h))
        wanted = one_hot(batch.y, self.classes).to(h.dtype)
        # Reduced by itself: on a CPU the loss's own mean keeps the room of all its terms.
        unlike = mse_loss(similarity(_profile(mapped)), similarity(wanted), reduction="none").mean()
        beta = self.constants["beta"]
        total = (1 - beta) * cross_entropy(logits, batch.y, reduction="sum") + beta * unlike * len(h)
        return Step(total, {"x": _tail(cell, h.detach())}, logits.detach())

    def read(self, cell: nn.Module, head: Any, streams: Streams) -> tuple[Streams, Tensor | None]:
        """See ``Objective.read``: the vote is read before pooling."""
        h = _body(cell, streams["x"])
        return {"x": _tail(cell, h)}, head["predict"](self._read(h))

    def _read(self, h: Tensor) -> Tensor:
        """What the prediction head reads of activations, [B, at most 2048] for maps."""
        if h.ndim != 4:
            return self.vector(h)
        side = max(1, min(*h.shape[2:], isqrt(_MOST_INPUTS // h.shape[1])))
        return averaged(h, side).flatten(1)


def averaged(h: Tensor, side: int) -> Tensor:
    """Maps [B, C, H, W] averaged down to [B, C, side, side] as ``adaptive_avg_pool2d`` does.

    On CUDA that operation's backward pass gives other bits every time: windows of equal size are pooled plainly, and
    others by products with fixed matrices.
    """
    height, width = h.shape[2:]
    if height % side == 0 and width % side == 0:
        return avg_pool2d(h, (height // side, width // side))
    return _windows(height, side, h) @ h @ _windows(width, side, h).T


def _windows(size: int, side: int, like: Tensor) -> Tensor:
    """Weights [side, size] of the means over windows: window i is [floor(i size / side), ceil((i + 1) size / side))."""
    place = torch.arange(size, device=like.device)
    window = torch.arange(side, device=like.device)[:, None]
    first = window * size // side
    last = ((window + 1) * size + side - 1) // side
    return ((place >= first) & (place < last)).to(like.dtype) / (last - first)


def similarity(rows: Tensor) -> Tensor:
    """Cosine similarities of mean-centred rows [B, n]: [B, B], within -1..1."""
    centred = rows - rows.mean(1, keepdim=True)
    squares = centred.square().sum(1, keepdim=True).clamp(min=_LEAST)  # a root has no slope at zero
    unit = centred / (1e-8 + squares.sqrt())
    return (unit @ unit.T).clamp(-1, 1)


def _profile(mapped: Tensor) -> Tensor:
    """[B, n] of what the learned map gives: of images [B, C, H, W] each channel's deviation over the pixels."""
    if mapped.ndim == 4 and prod(mapped.shape[2:]) > 1:
        return mapped.flatten(2).std(2)
    return mapped.flatten(1)


def _body(cell: nn.Module, x: Tensor) -> Tensor:
    h: Tensor = cell.body(x) if isinstance(cell, Layer) else cell(x)
    return h


def _tail(cell: nn.Module, h: Tensor) -> Tensor:
    return cell.tail(h) if isinstance(cell, Layer) else h
