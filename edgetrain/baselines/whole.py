"""A whole net as one cell: the machine then trains it as it trains any cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from edgetrain.keys import seeded
from edgetrain.nets.base import CellRecipe
from edgetrain.store.entries import Fingerprint

Change = Callable[[nn.Module], nn.Module]


class WholeNet(CellRecipe):
    """The recipe of a chain of cells joined into one; ``parts`` are the recipes of the chain."""

    parts: tuple[CellRecipe, ...]
    change: Change

    def materialise(self, seed: int, index: int) -> nn.Module:
        """See ``CellRecipe.materialise``; each part starts from the weights that it would have alone."""
        return tied(self.parts, [self._part(seed, number) for number in range(len(self.parts))])

    def fingerprints(self) -> list[Fingerprint]:
        """See ``CellRecipe.fingerprints``."""
        return [each for part in self.parts for each in part.fingerprints()]

    def _part(self, seed: int, number: int) -> nn.Module:
        module = self.parts[number].materialise(seed, number)
        with seeded(seed, "change", number):
            return self.change(module)


class Chain(nn.Sequential):
    """The layers of a whole net in a row.

    Attributes:
        draws: of each layer, whether it draws random numbers when it runs.
    """

    def __init__(self, layers: Sequence[nn.Module], draws: Sequence[bool]):
        super().__init__(*layers)
        self.draws = tuple(draws)


def _unchanged(module: nn.Module) -> nn.Module:
    return module


def tied(parts: Sequence[CellRecipe], modules: Sequence[nn.Module]) -> Chain:
    """The modules of ``parts`` in a row, with the tensors that they share made one again."""
    for recipe, module in zip(parts, modules, strict=True):
        for name, cell, other in recipe.tied:
            path, _, leaf = name.rpartition(".")
            source_path, _, source_leaf = other.rpartition(".")
            old = getattr(module.get_submodule(path), leaf)
            new = getattr(modules[cell].get_submodule(source_path), source_leaf)
            for owner in module.modules():  # a tensor may have several names within its cell
                _replace(owner, old, new)
    return Chain(modules, [recipe.draws for recipe in parts])


def _replace(owner: nn.Module, old: Tensor, new: Tensor) -> None:
    for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
        if tensor is old:
            setattr(owner, leaf, new)


def joined(recipes: list[CellRecipe], change: Change = _unchanged) -> WholeNet:
    """One recipe for a chain of cells, each of whose modules goes through ``change`` when it is made."""
    parts = tuple(recipes)
    cell = WholeNet(
        name=f"net of {len(parts)} cells",
        in_shape=parts[0].in_shape,
        out_shape=parts[-1].out_shape,
        build=lambda: tied(parts, [change(part.build()) for part in parts]),
        signature=("joined", *(part.signature for part in parts)),
        draws=any(part.draws for part in parts),
        couples_batch=any(part.couples_batch for part in parts),
        needs_values=any(part.needs_values for part in parts),
        kept_bytes=sum(part.kept_bytes for part in parts),
        channels_last=any(part.channels_last for part in parts) and not any(part.needs_contiguous for part in parts),
    )
    object.__setattr__(cell, "parts", parts)
    object.__setattr__(cell, "change", change)
    return cell
