"""What a local learning rule is: small, pure, and ignorant of the machine that runs it.

An objective never moves tensors between devices, opens files, or knows its schedule; the machine
never mentions an objective by name. Its losses are sums over samples: the machine divides by the
batch size, so that a short micro-batch weighs right.

Legend: B rows of a micro-batch, C classes, n units of a cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
Vote = Literal["sum", "last", "classifier"]
Constants = Mapping[str, float]
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Defaults:
    """What ``fit`` uses for a method when nothing is said; no schedule: the whole net is one cell."""

    schedule: Schedule | None
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    classifier_lr: float = 1e-3
    classifier_weight_decay: float = 0.0


class _Keyed:
    """Fixed random numbers that belong to one place in the net."""

    index: int
    seed: int

    def generator(self, word: str) -> torch.Generator:
        """A CPU generator for a draw that belongs to this place, such as a fixed projection."""
        return generator("cpu", self.seed, "node", self.index, word)

    def normal(self, word: str, shape: tuple[int, ...], std: float) -> Tensor:
        """Fixed normal numbers of this place, float32, the same for every caller; without values on meta."""
        values = torch.empty(shape)
        return values if values.is_meta else values.normal_(0.0, std, generator=self.generator(word))


@dataclass(frozen=True, eq=False)
class Input(_Keyed):
    """The network's input, as the first cell's parent.

    Attributes:
        shape: of one sample of the data.
        seed: the run's.
        index: -1.
    """

    shape: tuple[int, ...]
    seed: int
    index: int = -1


@dataclass(frozen=True, eq=False)
class Node(_Keyed):
    """Where a cell stands in the net: what is needed to build its head.

    Attributes:
        index: 0 for the first cell.
        recipe: the cell's recipe.
        shape: of one sample of its latents.
        seed: the run's.
        parent: whose latents it reads: a cell, or the network's input.
        output: of the last cell: the output layer of a net that has its own, for objectives that keep it.
        is_last: whether it is the last cell.
        channels_last: whether it computes with images in channels-last order.
    """

    index: int
    recipe: CellRecipe
    shape: tuple[int, ...]
    seed: int
    parent: Node | Input = field(repr=False)
    output: CellRecipe | None = field(default=None, repr=False)
    is_last: bool = False
    channels_last: bool = False


def nodes(
    recipes: list[CellRecipe],
    in_shape: tuple[int, ...],
    seed: int,
    output: CellRecipe | None = None,
    channels_last: bool = False,
) -> list[Node]:
    """One node for each cell, each knowing its parent; the last one knows the net's output layer.

    ``channels_last``: whether cells that compute faster in that order do so.
    """
    parent: Node | Input = Input(in_shape, seed)
    chain: list[Node] = []
    for index, recipe in enumerate(recipes):
        last = index == len(recipes) - 1
        parent = Node(
            index,
            recipe,
            recipe.out_shape,
            seed,
            parent,
            output if last else None,
            last,
            channels_last and recipe.channels_last,
        )
        chain.append(parent)
    return chain


class Draws(Protocol):
    """Keyed random numbers of one step, the same for every way to cut the step into micro-batches."""

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal numbers shaped as ``like`` [B, ...], drawn for the whole batch and sliced."""
        ...

    def keep(self, name: str, like: Tensor, chance: float) -> Tensor:
        """A mask shaped as ``like``, 1 with probability ``chance`` and else 0; one for the whole step."""
        ...

    def uniform(self, name: str, columns: int, like: Tensor) -> Tensor:
        """Uniform numbers in 0..1, float32 [B, columns], beside ``like`` [B, ...]; a sample's own.

        They are keyed by (seed, epoch, sample), never by cell, so they may choose data.
        """
        ...

    def seed_layer(self, layer: int, like: Tensor) -> None:
        """Seed the global generators for a layer of a whole net that draws when it runs, such as dropout.

        The key is of this layer and micro-batch, so that layers may run in any order, and again. ``like``: a tensor on
        the device.
        """
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

    Attributes:
        name: what ``--method`` calls it.
        citation: of the paper, printed with every run.
        needs: what it asks of data and net, for people.
        default_net: the net where none is named.
        net_defaults: options of the net where the user says nothing.
        constants: the rule's own numbers, which ``--constants`` may replace.
        shares: those of them that are from 0 to below 1.
        defaults: optimizer and schedule where the user says nothing.
        vote: how classes are read off.
        classifier: the cells whose latents a trained classifier may read; ``None``: there is none.
        classifier_stream: of their latents, the stream that it reads.
        couples_batch: whether the samples of a batch influence each other's loss.
        nonnegative_input: whether tables are scaled to 0..1 instead of standardised.
        takes_tokens: whether it can learn from rows of token ids.
        draws_streams: whether ``streams`` draws, so that views of the data differ without augmentation.
        saves_on_host: whether what the backward pass needs waits on the host.
        streams_layers: whether each step goes forward through all cells and back, one of them on the device at a time.
        keeps_output: whether the output layer of a user's net is trained; otherwise it is left out.
        like: for baselines: the method whose net options are taken where none is named.
        phases: a step's optimisations, in order.
        stream_names: of the latents between cells.
        unlabelled_names: of the streams in which classes are looked for.
    """

    name: ClassVar[str]
    citation: ClassVar[str] = ""
    needs: ClassVar[str] = "labels"
    default_net: ClassVar[str] = "mlp:1000x2"
    net_defaults: ClassVar[Mapping[str, str]] = _NONE
    constants: Constants = _NONE
    shares: frozenset[str] = frozenset()
    defaults: ClassVar[Defaults]
    vote: ClassVar[Vote]
    classifier: ClassVar[Literal["all", "last"] | None] = None
    classifier_stream: ClassVar[str] = "x"
    couples_batch: ClassVar[bool] = False
    nonnegative_input: ClassVar[bool] = False
    takes_tokens: ClassVar[bool] = True
    draws_streams: ClassVar[bool] = False
    saves_on_host: ClassVar[bool] = False
    streams_layers: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False
    like: ClassVar[str | None] = None
    phases: ClassVar[tuple[Phase, ...]] = (Phase("step"),)
    stream_names: tuple[str, ...] = ("x",)
    unlabelled_names: tuple[str, ...] = ("x",)

    def __init__(self, classes: int, options: Options, constants: Constants = _NONE, trains_classifier: bool = False):
        self.classes = classes
        self.options = options
        self.constants = {**self.constants, **constants}
        self.trains_classifier = trains_classifier

    @classmethod
    def reads(cls, shape: tuple[int, ...], table: bool, classes: int) -> tuple[int, ...]:
        """Shape of one sample that the first cell reads, of data with rows of ``shape``.

        Where it is another one, the net's options have ``label=beside``.
        """
        return shape

    def remarks(self, cells: Sequence[Node]) -> tuple[str, ...]:
        """Sentences that a plan says of how the rule reads these data."""
        return ()

    def check(self, cells: Sequence[Node]) -> None:  # noqa: B027 (most rules learn from anything)
        """Refuse cells or data that the rule cannot learn from.

        Raises:
            InputError: says what the rule needs.
        """

    def join(self, recipes: list[CellRecipe]) -> list[CellRecipe]:
        """The cells that are trained, one at a time; a whole-net baseline joins them into one."""
        return recipes

    def streams(self, x: Tensor, y: Tensor, draws: Draws) -> Streams:
        """The streams that the first cell learns from, by ``stream_names``, from inputs [B, ...] and labels [B]."""
        return {"x": x}

    def unlabelled_streams(self, x: Tensor) -> Streams:
        """The streams that the first cell reads when the labels are to be found, by ``unlabelled_names``."""
        return {"x": x}

    def head(self, node: Node) -> nn.Module | None:
        """What a cell learns with; drawn from torch's global CPU generator, which is keyed by ``head_index``."""
        return None

    def head_index(self, node: Node) -> int:
        """The number that keys the first weights of a cell's head."""
        return node.index

    @abstractmethod
    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """The local loss of one micro-batch; its graph must not reach beyond the cell and its head."""

    def latent(self, cell: nn.Module, streams: Streams) -> Streams:
        """The cell's latents for clean inputs."""
        return {name: cell(values) for name, values in streams.items()}

    def score(self, head: Any, latents: Streams) -> Tensor | None:
        """The cell's own vote, [B, C], from its latents; ``None`` if it has none."""
        return None

    def read(self, cell: nn.Module, head: Any, streams: Streams) -> tuple[Streams, Tensor | None]:
        """Latents of a finished cell, and its vote [B, C]."""
        latents = self.latent(cell, streams)
        return latents, self.score(head, latents)

    def tileable(self, node: Node) -> bool:
        """Whether the cell can be trained in tiles of its units; see ``objectives.statistic``."""
        return False

    def read_by_classifier(self, depth: int) -> tuple[int, ...]:
        """The cells, of ``depth``, whose latents the trained classifier reads; none if none is trained."""
        if not self.trains_classifier:
            return ()
        return tuple(range(depth)) if self.classifier == "all" else (depth - 1,)

    def evaluation_batch(self, micro_batch: int) -> int:
        """Samples at once where classes are looked for, so that as many rows are there as in training."""
        return max(1, micro_batch * len(self.stream_names) // len(self.unlabelled_names))

    def features(self, latents: Tensor) -> Tensor:
        """What a trained classifier reads of a cell's latents [B, ...], one stream: [B, n]."""
        return self.vector(latents)

    def vector(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] as one vector a sample, [B, n]: of tokens [B, T, D] what the net says, else all."""
        reading = self.options.get("tokens", "flatten")
        if latents.ndim != 3 or reading == "flatten":
            return latents.flatten(1)
        return latents[:, 0] if reading == "class" else latents.mean(1)

    def width(self, shape: tuple[int, ...]) -> int:
        """Length of ``vector`` for latents of this shape."""
        return self.vector(torch.empty(1, *shape, device="meta")).shape[1]
