"""What a local learning rule is: small, pure, and ignorant of the machine that runs it.

An objective never moves tensors between devices, opens files, or knows its schedule; the machine
never mentions an objective by name. Its losses are sums over samples: the machine divides by the
batch size, so that a short micro-batch weighs right.

Legend: B rows of a micro-batch, C classes, n units of a cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from edgetrain.keys import generator
from edgetrain.nets.base import CellRecipe, Options

#: The latents of a set of samples by stream: ``{"x": [B, ...]}``; FF has pos, neg and neutral.
Streams = Mapping[str, Tensor]
Schedule = Literal["separate", "sequence"]
Vote = Literal["sum", "last", "trained"]


@dataclass(frozen=True)
class Defaults:
    """What ``fit`` uses for a method when nothing is said; no schedule: the whole net is one cell."""

    schedule: Schedule | None
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    classifier_lr: float = 1e-3
    classifier_weight_decay: float = 0.0


@dataclass(frozen=True, eq=False)
class Node:
    """Where a cell stands in the net: what is needed to build its head.

    Attributes:
        index: 0 for the first cell, -1 for the network's input.
        recipe: the cell's recipe; ``None`` for the input.
        shape: of one sample of its latents (for the input: of the data).
        seed: the run's.
        parent: the node whose latents it reads.
    """

    index: int
    recipe: CellRecipe | None
    shape: tuple[int, ...]
    seed: int
    parent: Node | None = field(repr=False)

    def generator(self, word: str) -> torch.Generator:
        """A CPU generator for a draw that belongs to this cell, such as a fixed projection."""
        return generator("cpu", self.seed, "node", self.index, word)


def nodes(recipes: list[CellRecipe], in_shape: tuple[int, ...], seed: int) -> list[Node]:
    """One node for each cell, each knowing its parent."""
    parent = Node(-1, None, in_shape, seed, None)
    chain = []
    for index, recipe in enumerate(recipes):
        parent = Node(index, recipe, recipe.out_shape, seed, parent)
        chain.append(parent)
    return chain


class Draws(Protocol):
    """Keyed random numbers of one step, the same for every way to cut the step into micro-batches."""

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers shaped as ``like`` [B, ...], drawn for the whole batch and sliced."""
        ...


@dataclass(frozen=True)
class Batch:
    """What an objective is shown of one micro-batch.

    Attributes:
        streams: the parent's latents, float32 [B, ...], without gradient.
        y: labels [B], int64.
        draws: the step's random numbers.
    """

    streams: Streams
    y: Tensor
    draws: Draws


@dataclass(frozen=True)
class Step:
    """What an objective makes of one micro-batch.

    Attributes:
        loss: the sum of the samples' losses, a scalar with gradient.
        emitted: the cell's latents if this pass computed them (detached), before the update; ``None``:
            the machine asks ``latent`` for them instead.
        scores: [B, C] from which training accuracy is read off, or ``None``.
    """

    loss: Tensor
    emitted: Streams | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """One of a step's optimisations, with an optimizer of its own; most rules have one phase.

    Attributes:
        name: passed to ``loss``.
        parameters: picks what this phase learns, by qualified name (``cell.linear.weight``).
    """

    name: str
    parameters: Callable[[str], bool] = field(default=lambda name: True)


class Objective(ABC):
    """A local learning rule for the cells of a net.

    Class attributes are facts that the planner and the profile ask without running anything.
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    needs: ClassVar[str]
    net_defaults: ClassVar[Mapping[str, str]] = MappingProxyType({})
    defaults: ClassVar[Defaults]
    vote: ClassVar[Vote]
    couples_batch: ClassVar[bool] = False
    nonnegative_input: ClassVar[bool] = False
    phases: ClassVar[tuple[Phase, ...]] = (Phase("step"),)
    stream_names: ClassVar[tuple[str, ...]] = ("x",)

    def __init__(self, classes: int, options: Options):
        self.classes = classes
        self.options = options

    def join(self, recipes: list[CellRecipe]) -> list[CellRecipe]:
        """The cells that are trained, one at a time; a whole-net baseline joins them into one."""
        return recipes

    def streams(self, x: Tensor, y: Tensor, draws: Draws) -> Streams:
        """The streams that the first cell learns from, by ``stream_names``, from inputs [B, ...] and labels [B]."""
        return {"x": x}

    def unlabelled_streams(self, x: Tensor) -> Streams:
        """The streams that the first cell reads when the labels are to be found."""
        return {"x": x}

    def head(self, node: Node) -> nn.Module | None:
        """What a cell learns with; drawn from torch's global CPU generator, which is keyed."""
        return None

    @abstractmethod
    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """The local loss of one micro-batch; its graph must not reach beyond the cell and its head."""

    def latent(self, cell: nn.Module, streams: Streams) -> Streams:
        """What the cell hands on for clean inputs."""
        return {name: cell(values) for name, values in streams.items()}

    def score(self, head: Any, latents: Streams) -> Tensor | None:
        """The cell's own vote, [B, C], from its latents; ``None`` if it has none."""
        return None
