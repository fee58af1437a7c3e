"""Plain backpropagation of cross-entropy through the whole net, as the baseline, and its thrifty forms.

The net's cells are joined into one, with a linear classifier as its head, and the machine trains that
one cell: the same step, optimizer, order of data, meter and budget as the local rules have, so that a
comparison is fair. `tests/reference` holds the same in plain PyTorch, bit for bit.

What a user would try first today when that does not fit:

* ``bp-checkpoint``: Tianqi Chen et al.: Training Deep Nets with Sublinear Memory Cost, 2016,
  https://arxiv.org/abs/1604.06174. Only the activations between cells are kept; each cell's own are
  computed again on the way back. Batch statistics are not updated a second time.
* ``bp-offload``: Minsoo Rhu et al.: vDNN, 2016, https://arxiv.org/abs/1602.08124. All that the
  backward pass needs, other than weights, waits on the host.
* ``bp-stream``: Bharadwaj Pudipeddi et al.: Training Large Neural Networks with Constant Memory using a New
  Execution Algorithm (L2L), 2020, https://arxiv.org/abs/2002.05645. One layer at a time is on the device, forward and
  back; the weights are bit for bit those of ``bp-checkpoint``. See ``stream/streamed.py``.

``slp`` is the least that a net must beat: the classifier alone, on the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from edgetrain.baselines.whole import Chain, joined
from edgetrain.nets.base import CellRecipe
from edgetrain.nets.memory_format import dense_format
from edgetrain.nets.settled import settled
from edgetrain.objectives.base import Batch, Defaults, Draws, Node, Objective, Step, Streams

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class Backpropagation(Objective):
    """Cross-entropy of a linear classifier on the last cell, differentiated through all cells."""

    name = "bp"
    citation = (
        "D. E. Rumelhart, G. E. Hinton, R. J. Williams: Learning representations by back-propagating"
        " errors. Nature 323, 1986."
    )
    needs = "labels; any net; holds the whole net and its activations on the device"
    defaults = Defaults(schedule=None, optimizer="adam", lr=1e-3)
    vote = "last"
    keeps_output = True
    like: ClassVar[str | None] = "mf"

    def join(self, recipes: list[CellRecipe]) -> list[CellRecipe]:
        """One cell that holds the whole chain."""
        return [joined(recipes)]

    def head(self, node: Node) -> nn.Module | None:
        """See ``output_layer``."""
        return self.output_layer(node)

    def output_layer(self, node: Node) -> nn.Module:
        """The output layer [n] -> [C]: the net's own, or a linear map with bias where the net's layers have one."""
        if node.output is not None:
            return node.output.materialise(node.seed, node.index)
        return nn.Linear(self.width(node.shape), self.classes, bias=self.options["bias"] == "1")

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """Summed cross-entropy."""
        logits = head(self.vector(self.forward(cell, batch.streams["x"], batch.draws)))  # [B, C]
        return Step(cross_entropy(logits, batch.y, reduction="sum"), None, logits.detach())

    def forward(self, cell: nn.Module, x: Tensor, draws: Draws) -> Tensor:
        """The last layer's output for inputs [B, ...], with its graph."""
        if not (isinstance(cell, Chain) and any(cell.draws)):
            return cell(x)  # type: ignore[no-any-return]
        for number, layer in enumerate(cell):
            x = _run(layer, x, number if cell.draws[number] else None, draws)
        return x

    def score(self, head: Any, latents: Streams) -> Tensor | None:
        """The output layer's logits, [B, C]."""
        return head(self.vector(latents["x"]))  # type: ignore[no-any-return]


class CheckpointedBackpropagation(Backpropagation):
    """Backpropagation that computes each cell's activations again on the way back."""

    name = "bp-checkpoint"
    citation = (
        "T. Chen, B. Xu, C. Zhang, C. Guestrin: Training Deep Nets with Sublinear Memory Cost. arXiv:1604.06174, 2016."
    )
    needs = "labels; any net; holds the whole net, what passes between cells, and one cell's activations"

    def forward(self, cell: nn.Module, x: Tensor, draws: Draws) -> Tensor:
        """See ``Backpropagation.forward``."""
        assert isinstance(cell, Chain)
        for number, layer in enumerate(cell):
            drawing = number if cell.draws[number] else None
            # Keyed draws need no saved state of the generators. A pass that stops early leaves out the draws of RReLU.
            with set_checkpoint_early_stop(drawing is None):
                x = checkpoint(
                    *(_run, layer, x, drawing, draws),
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=_again(layer),
                )
            if number < len(cell) - 1:
                x = _Dense.apply(x)  # type: ignore[no-untyped-call]
        return x


class OffloadedBackpropagation(Backpropagation):
    """Backpropagation whose saved activations wait on the host."""

    name = "bp-offload"
    citation = (
        "M. Rhu, N. Gimelshein, J. Clemons, A. Zulfiqar, S. W. Keckler: vDNN: Virtualized Deep Neural Networks for"
        " Scalable, Memory-Efficient Neural Network Design. MICRO 2016. arXiv:1602.08124."
    )
    needs = "labels; any net; holds the whole net, and its activations on the host"
    saves_on_host = True


class StreamedBackpropagation(Backpropagation):
    """Backpropagation with one layer at a time on the device."""

    name = "bp-stream"
    citation = (
        "B. Pudipeddi, M. Mesmakhosroshahi, J. Xi, S. Bharadwaj: Training Large Neural Networks with Constant Memory"
        " using a New Execution Algorithm. arXiv:2002.05645, 2020."
    )
    needs = "labels; any net; holds one layer and one micro-batch; moves every layer twice in every step"
    streams_layers = True

    def join(self, recipes: list[CellRecipe]) -> list[CellRecipe]:
        """The layers, all in the memory format of the whole net."""
        channels_last = joined(recipes).channels_last
        return [replace(recipe, channels_last=channels_last) for recipe in recipes]

    def head(self, node: Node) -> nn.Module | None:
        """The output layer, of the last layer."""
        return super().head(node) if node.is_last else None

    def head_index(self, node: Node) -> int:
        """As the whole net's, so that its first weights are the same."""
        return 0

    def score(self, head: Any, latents: Streams) -> Tensor | None:
        """The output layer's logits, [B, C]."""
        return None if head is None else super().score(head, latents)


class SingleLayer(Backpropagation):
    """A linear classifier on the inputs; the net's cells are left out."""

    name = "slp"
    citation = "F. Rosenblatt: The Perceptron. Psychological Review 65(6), 1958."
    needs = "labels; takes no net: the classifier alone reads the inputs"
    takes_tokens = False
    keeps_output = False
    like = None

    def join(self, recipes: list[CellRecipe]) -> list[CellRecipe]:
        """A cell that only flattens the inputs."""
        shape = recipes[0].in_shape
        inputs = prod(shape)
        return [CellRecipe(f"linear {inputs}-{self.classes}", shape, (inputs,), nn.Flatten, ("inputs", shape))]


def _run(layer: nn.Module, x: Tensor, drawing: int | None, draws: Draws) -> Tensor:
    """A layer's output; ``drawing``: its number if it draws random numbers."""
    if drawing is not None:
        draws.seed_layer(drawing, x)
    return layer(x)  # type: ignore[no-any-return]


class _Dense(torch.autograd.Function):
    """Passes on what lies densely in memory, forward and back, as ``bp-stream`` stores it between layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """[B, ...] -> the same."""
        ctx.memory_format = dense_format(x)
        return x.contiguous(memory_format=ctx.memory_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient in the same order."""
        return gradients[0].contiguous(memory_format=ctx.memory_format)


def _again(layer: nn.Module) -> Callable[[], Contexts]:
    """Contexts for a layer's first pass and for the pass that computes it again."""
    return lambda: (nullcontext(), settled(layer))
