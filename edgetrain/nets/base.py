"""A net is a chain of recipes; a cell exists only after it was visited for the first time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import xxhash
from torch import nn

from edgetrain.keys import seeded
from edgetrain.store.entries import Fingerprint

#: Option values of a net spec: what the user wrote after ``;``, else what the method prefers.
Options = Mapping[str, str]
#: A tensor of a cell that is a tensor of an earlier cell too: (its name here, that cell's number, its name there).
Tie = tuple[str, int, str]
MOST_CELLS = 100_000  # a recipe takes 1.5 KiB of the host's memory
MOST_UNITS = 10_000_000  # of a cell; beyond a billion the bytes of a convolution no longer fit 64 bits


@dataclass(frozen=True)
class CellRecipe:
    """How to make one cell.

    Attributes:
        name: shown to people, e.g. ``linear 784-1000``.
        in_shape: of one sample that the cell reads.
        out_shape: of one sample of the latents that it emits.
        build: makes the module; draws its weights from torch's global CPU generator.
        signature: cells of equal signature take equal memory and time.
        draws: whether the module draws random numbers when it runs (dropout).
        couples_batch: whether the samples of a batch influence each other (batch normalisation).
        narrower: the same cell with fewer units, where each unit has weights of its own and no other's
            output; units are the first axis of all its tensors. ``None``: it cannot be cut.
        body_shape: of one sample of the activations before pooling (``Layer.body``), where it differs
            from ``out_shape``; else ``None``.
        needs_values: whether the module fails on fake tensors, which have shapes but no values.
        behaviour: outputs of a user's module in its trial, by which it is recognised.
        tied: tensors that are tensors of earlier cells too.
        kept_bytes: host memory that a user's module takes between visits.
        made_of: the modules of a user's net that form the cell, by class, for people.
        channels_last: whether it computes faster with images in channels-last order; see ``nets/memory_format.py``.
        needs_contiguous: whether it fails, or computes something else, on images in channels-last order.
    """

    name: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    build: Callable[[], nn.Module] = field(repr=False, compare=False)
    signature: Hashable
    draws: bool = False
    couples_batch: bool = False
    narrower: Callable[[int], CellRecipe] | None = field(default=None, repr=False, compare=False)
    body_shape: tuple[int, ...] | None = None
    needs_values: bool = False
    behaviour: tuple[float, ...] = ()
    tied: tuple[Tie, ...] = ()
    kept_bytes: int = 0
    made_of: str = ""
    channels_last: bool = False
    needs_contiguous: bool = False

    @property
    def width(self) -> int:
        """Numbers in one sample of the latents."""
        return prod(self.out_shape)

    def materialise(self, seed: int, index: int) -> nn.Module:
        """The cell with its first weights, on the host; the same for the same seed and index."""
        with seeded(seed, "cell", index):
            return self.build()

    def skeleton(self) -> nn.Module:
        """The cell's shapes alone, on the meta device."""
        with torch.device("meta"):
            return self.build()

    def fingerprints(self) -> list[Fingerprint]:
        """By what the cell is recognised; a recipe of several cells gives one for each."""
        return [Fingerprint(self.name, xxhash.xxh3_64_hexdigest(repr(self.signature).encode()), self.behaviour)]

    def parameters(self) -> int:
        """Learned numbers in the cell."""
        return sum(parameter.numel() for parameter in self.skeleton().parameters())


@dataclass(frozen=True)
class Net:
    """A chain of cells.

    Attributes:
        spec: what the user wrote, or the name of the user's own net.
        cells: the recipes, first to last.
        options: the options that were in force, for records and for baselines like it.
        output: the output layer of a user's net that has one, which reads the last cell's latents, flattened.
    """

    spec: str
    cells: Sequence[CellRecipe]
    options: Options
    output: CellRecipe | None = None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Of one sample of the data set."""
        return self.cells[0].in_shape
