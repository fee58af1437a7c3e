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

``slp`` is the least that a net must beat: the classifier alone, on the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from edgetrain.baselines.whole import joined
from edgetrain.nets.base import CellRecipe
from edgetrain.objectives.base import Batch, Defaults, Node, Objective, Step, Streams

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

    def head(self, node: Node) -> nn.Module:
        """The output layer [n] -> [C]: the net's own, or a linear map with bias where the net's layers have one."""
        if node.output is not None:
            return node.output.materialise(node.seed, node.index)
        return nn.Linear(self.width(node.shape), self.classes, bias=self.options["bias"] == "1")

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """Summed cross-entropy."""
        logits = head(self.vector(self.forward(cell, batch.streams["x"])))  # [B, C]
        return Step(cross_entropy(logits, batch.y, reduction="sum"), None, logits.detach())

    def forward(self, cell: nn.Module, x: Tensor) -> Tensor:
        """The last cell's output for inputs [B, ...], with its graph."""
        z: Tensor = cell(x)
        return z

    def score(self, head: Any, latents: Streams) -> Tensor:
        """The classifier's logits, [B, C]."""
        return head(self.vector(latents["x"]))  # type: ignore[no-any-return]


class CheckpointedBackpropagation(Backpropagation):
    """Backpropagation that computes each cell's activations again on the way back."""

    name = "bp-checkpoint"
    citation = (
        "T. Chen, B. Xu, C. Zhang, C. Guestrin: Training Deep Nets with Sublinear Memory Cost. arXiv:1604.06174, 2016."
    )
    needs = "labels; any net; holds the whole net, what passes between cells, and one cell's activations"

    def forward(self, cell: nn.Module, x: Tensor) -> Tensor:
        """See ``Backpropagation.forward``."""
        assert isinstance(cell, nn.Sequential)
        for part in cell:
            x = checkpoint(part, x, use_reentrant=False, context_fn=_again(part))
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


def _again(part: nn.Module) -> Callable[[], Contexts]:
    """Contexts for a part's first pass and for the pass that computes it again."""
    norms = [module for module in part.modules() if isinstance(module, _BatchNorm)]
    return lambda: (nullcontext(), _settled(norms))


@contextmanager
def _settled(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch normalisation uses the batch's statistics and leaves the running ones as they are."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
