"""Feedback alignment and direct feedback alignment: errors come back through fixed random matrices.

Timothy Lillicrap et al.: Random synaptic feedback weights support error backpropagation for deep learning.
Nature Communications 7, 2016, https://arxiv.org/abs/1411.0247 (FA). Arild Noekland: Direct Feedback
Alignment Provides Learning in Deep Neural Networks. NeurIPS 2016, https://arxiv.org/abs/1609.01596 (DFA).

    FA:   dx = dz B     in place of dx = dz W, for every dense and convolutional layer but the first
    DFA:  da_l = e B_l, e = softmax(logits) - y: the output error straight to each cell's output

Within a cell the derivative is the true one (ReLU, pooling, normalisation). B is drawn as weights are, from
its own key, and never stored; B_l is N(0, 1/C). The classifier learns by its true gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, linear, one_hot
from torch.nn.grad import conv2d_input, conv2d_weight

from edgetrain.baselines.backprop import Backpropagation
from edgetrain.baselines.whole import WholeNet, joined
from edgetrain.errors import InputError
from edgetrain.nets.base import CellRecipe
from edgetrain.objectives.base import Batch, Node, Step

_PASSED = (nn.Flatten, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.AvgPool2d, nn.MaxPool2d, nn.LayerNorm, nn.RMSNorm)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_FIRST = (nn.Embedding, nn.EmbeddingBag)  # nothing is before them for an error to go back to


class FeedbackAlignment(Backpropagation):
    """Backpropagation with fixed random weights on the way back."""

    name = "fa"
    citation = (
        "T. P. Lillicrap, D. Cownden, D. B. Tweed, C. J. Akerman: Random synaptic feedback weights support error"
        " backpropagation for deep learning. Nature Communications 7, 2016."
    )
    needs = "labels; mlp: and cnn: nets (dense and convolutional layers); memory as bp and a copy of the weights"
    like = None

    def join(self, recipes: list[CellRecipe]) -> list[CellRecipe]:
        """See ``Backpropagation.join``; every layer gets its feedback weights."""
        for recipe in recipes:
            _check(recipe)
        return [joined(recipes, aligned)]

    def head(self, node: Node) -> nn.Module:
        """See ``Backpropagation.head``."""
        return aligned(self.output_layer(node))


class DirectFeedbackAlignment(Backpropagation):
    """The output error is projected straight to every cell."""

    name = "dfa"
    citation = (
        "A. Noekland: Direct Feedback Alignment Provides Learning in Deep Neural Networks. NeurIPS 2016."
        " arXiv:1609.01596."
    )
    needs = "labels; any net; memory as bp and a matrix of classes x units for each cell"
    like = None

    def head(self, node: Node) -> nn.Module:
        """``classifier``, and ``feedback``: a fixed matrix [C, n] for each cell."""
        assert isinstance(node.recipe, WholeNet)
        shapes = [part.out_shape for part in node.recipe.parts]
        std = self.classes**-0.5
        head = nn.ModuleDict({"classifier": self.output_layer(node), "feedback": nn.Module()})
        for index, shape in enumerate(shapes):
            matrix = node.normal(f"feedback {index}", (self.classes, *shape), std)
            head["feedback"].register_buffer(str(index), matrix, persistent=False)
        return head

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """Summed cross-entropy, whose gradient is replaced by the projected errors."""
        assert isinstance(cell, nn.Sequential)
        z, outputs = batch.streams["x"], []
        for part in cell:
            outputs.append(part(z))
            z = outputs[-1].detach()
        logits = head["classifier"](self.vector(z))  # [B, C]
        total = cross_entropy(logits, batch.y, reduction="sum")
        error = logits.detach().softmax(1) - one_hot(batch.y, self.classes)
        for output, feedback in zip(outputs, head["feedback"].buffers(), strict=True):
            surrogate = (output.flatten(1) * (error @ feedback.flatten(1))).sum()
            total = total + (surrogate - surrogate.detach())  # nothing but its gradient
        return Step(total, None, logits.detach())

    def score(self, head: Any, latents: Any) -> Tensor | None:
        """See ``Backpropagation.score``."""
        return super().score(head["classifier"], latents)


class _Feedback(torch.autograd.Function):
    """A dense or 2-d convolutional layer whose error comes back through ``feedback`` instead of ``weight``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight, feedback)
        ctx.padding = padding
        return linear(x, weight, bias) if padding is None else conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, feedback = ctx.saved_tensors
        dz, padding, needed = gradients[0], ctx.padding, ctx.needs_input_grad
        if padding is None:
            dx = dz @ feedback if needed[0] else None
            return dx, dz.T @ x, dz.sum(0) if needed[2] else None, None, None
        dx = conv2d_input(x.shape, feedback, dz, padding=padding) if needed[0] else None  # type: ignore[no-untyped-call]
        dw = conv2d_weight(x, weight.shape, dz, padding=padding)  # type: ignore[no-untyped-call]
        return dx, dw, dz.sum((0, 2, 3)) if needed[2] else None, None, None


class AlignedLinear(nn.Linear):
    """``nn.Linear`` with fixed ``feedback`` weights [out, in] on the way back."""

    feedback: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        return _Feedback.apply(x, self.weight, self.bias, self.feedback, None)  # type: ignore[no-untyped-call,no-any-return]


class AlignedConv2d(nn.Conv2d):
    """``nn.Conv2d`` of stride 1 with fixed ``feedback`` weights on the way back."""

    feedback: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H', W']."""
        return _Feedback.apply(x, self.weight, self.bias, self.feedback, self.padding)  # type: ignore[no-untyped-call,no-any-return]


def aligned(module: nn.Module) -> nn.Module:
    """The module, its dense and convolutional layers with feedback weights drawn as their weights were."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_buffer("feedback", _drawn_again(layer), persistent=False)
            layer.__class__ = AlignedLinear if isinstance(layer, nn.Linear) else AlignedConv2d
    return module


def _drawn_again(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Other weights from the layer's own distribution; the layer keeps those it has."""
    kept = [value.detach().clone() for value in layer.parameters()]
    layer.reset_parameters()
    drawn = layer.weight.detach().clone()
    with torch.no_grad():
        for value, before in zip(layer.parameters(), kept, strict=True):
            value.copy_(before)
    return drawn


def _check(recipe: CellRecipe) -> None:
    """Refuse layers through which no fixed matrix leads back."""
    for module in recipe.skeleton().modules():
        if next(module.children(), None) is not None or isinstance(module, (*_PASSED, *_NORMS, *_FIRST)):
            continue
        if not (isinstance(module, nn.Linear) or _is_plain(module)):
            raise InputError(
                f"fa needs dense layers and convolutions of stride 1; cell {recipe.name!r} has a"
                f" {type(module).__name__}: use --net mlp:... or cnn:..., or --method dfa"
            )


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a convolution of stride 1, padded with zeros."""
    if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    return module.stride == module.dilation == (1, 1) and module.groups == 1
