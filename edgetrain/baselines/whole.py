"""A whole net as one cell: the machine then trains it as it trains any cell."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from edgetrain.keys import seeded
from edgetrain.nets.base import CellRecipe

Change = Callable[[nn.Module], nn.Module]


class WholeNet(CellRecipe):
    """The recipe of a chain of cells joined into one; ``parts`` are the recipes of the chain."""

    parts: tuple[CellRecipe, ...]
    change: Change

    def materialise(self, seed: int, index: int) -> nn.Module:
        """See ``CellRecipe.materialise``; each part starts from the weights that it would have alone."""
        return nn.Sequential(*(self._part(seed, number) for number in range(len(self.parts))))

    def _part(self, seed: int, number: int) -> nn.Module:
        module = self.parts[number].materialise(seed, number)
        with seeded(seed, "change", number):
            return self.change(module)


def _unchanged(module: nn.Module) -> nn.Module:
    return module


def joined(recipes: list[CellRecipe], change: Change = _unchanged) -> WholeNet:
    """One recipe for a chain of cells, each of whose modules goes through ``change`` when it is made."""
    parts = tuple(recipes)
    cell = WholeNet(
        name=f"net of {len(parts)} cells",
        in_shape=parts[0].in_shape,
        out_shape=parts[-1].out_shape,
        build=lambda: nn.Sequential(*(change(part.build()) for part in parts)),
        signature=("joined", *(part.signature for part in parts)),
        draws=any(part.draws for part in parts),
        couples_batch=any(part.couples_batch for part in parts),
    )
    object.__setattr__(cell, "parts", parts)
    object.__setattr__(cell, "change", change)
    return cell
