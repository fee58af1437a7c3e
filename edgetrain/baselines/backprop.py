"""Plain backpropagation of cross-entropy through the whole net, as the baseline.

The net's cells are joined into one, with a linear classifier as its head, and the machine trains that
one cell: the same step, optimizer, order of data, meter and budget as the local rules have, so that a
comparison is fair. `tests/reference` holds the same in plain PyTorch, bit for bit.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgetrain.nets.base import CellRecipe
from edgetrain.objectives.base import Batch, Defaults, Node, Objective, Step, Streams


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

    def join(self, recipes: list[CellRecipe]) -> list[CellRecipe]:
        """One cell that holds the whole chain."""
        return [joined(recipes)]

    def head(self, node: Node) -> nn.Module:
        """The classifier: a linear map [n] -> [C], with bias where the net's layers have one."""
        return nn.Linear(prod(node.shape), self.classes, bias=self.options["bias"] == "1")

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """Summed cross-entropy."""
        logits = head(cell(batch.streams["x"]).flatten(1))  # [B, C]
        return Step(cross_entropy(logits, batch.y, reduction="sum"), None, logits.detach())

    def score(self, head: Any, latents: Streams) -> Tensor:
        """The classifier's logits, [B, C]."""
        return head(latents["x"].flatten(1))  # type: ignore[no-any-return]


class _JoinedCell(CellRecipe):
    parts: tuple[CellRecipe, ...]

    def materialise(self, seed: int, index: int) -> nn.Module:
        """See ``CellRecipe.materialise``; each part starts from the weights that it would have alone."""
        return nn.Sequential(*(part.materialise(seed, number) for number, part in enumerate(self.parts)))


def joined(recipes: list[CellRecipe]) -> CellRecipe:
    """One recipe for a chain of cells."""
    parts = tuple(recipes)
    cell = _JoinedCell(
        name=f"net of {len(parts)} cells",
        in_shape=parts[0].in_shape,
        out_shape=parts[-1].out_shape,
        build=lambda: nn.Sequential(*(part.build() for part in parts)),
        signature=("joined", *(part.signature for part in parts)),
        draws=any(part.draws for part in parts),
        couples_batch=any(part.couples_batch for part in parts),
    )
    object.__setattr__(cell, "parts", parts)
    return cell
