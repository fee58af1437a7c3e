"""The classifier that LBP, one-pass FF and SLL train on the latents of all cells, or of the last.

The paper's concatenation [z_1 ... z_L] never exists. With latents z_l [B, n_l] of cells l and one linear map, cut
into blocks C_l [C, n_l] and a bias c, S = c + sum_l z_l C_l^T are the logits: a cell in tiles whose tiles are the
blocks, each of which reads the latents of one cell. A step needs room for one block and one micro-batch of one
cell's latents, whatever the depth (see ``stream.sweeps``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgetrain.keys import generator
from edgetrain.nets.base import CellRecipe
from edgetrain.objectives.base import Batch, Defaults, Input, Node, Objective, Step, Streams
from edgetrain.objectives.statistic import StatisticObjective
from edgetrain.stream.cell import ResidentCell, Setup
from edgetrain.stream.reader import LABELS_ONLY
from edgetrain.stream.state import CellState, Tensors
from edgetrain.stream.sweeps import Tiled


class _Logits(StatisticObjective):
    """Cross-entropy of the logits; the head of a tile is its block.

    Args:
        rule: whose latents are read.
    """

    name = "classifier"
    citation = needs = ""
    defaults = Defaults(schedule=None, optimizer="adam", lr=1e-3)
    vote = "classifier"

    def __init__(self, rule: Objective):
        super().__init__(rule.classes, rule.options)
        self._rule, self.stream_names = rule, (rule.classifier_stream,)

    def statistic(
        self, cell: nn.Module, head: nn.Module, streams: Streams, units: int | None = None
    ) -> tuple[Tensor, Streams]:
        """The block's part of the logits."""
        return head(self._rule.features(streams[self._rule.classifier_stream])), {}

    def loss_from(self, statistic: Tensor, head: object, batch: Batch) -> Step:
        """Summed cross-entropy."""
        return Step(cross_entropy(statistic, batch.y, reduction="sum"), None, statistic.detach())

    def scores_from(self, statistic: Tensor) -> Tensor:
        """The logits."""
        return statistic


@dataclass(frozen=True)
class ClassifierRecipe:
    """What a classifier is made of.

    Attributes:
        index: its number among the nodes of the schedule.
        widths: n_l of each cell that it reads.
        seed: the run's.
        resident: keep all blocks on the device.
    """

    index: int
    widths: Sequence[int]
    seed: int
    resident: bool = False


class Classifier(Tiled):
    """The classifier, its blocks on the device or brought there one by one.

    Args:
        recipe: its blocks.
        setup: what they are built with; the objective is the rule whose latents are read.
        state: host tensors to start from; ``None``: first weights.
    """

    loss_source = LABELS_ONLY

    def __init__(self, recipe: ClassifierRecipe, setup: Setup, state: CellState | None = None):
        self.index, self._recipe = recipe.index, recipe
        self.objective = _Logits(setup.objective)
        self.host, self.units = setup.host, sum(recipe.widths)
        self.sources: Sequence[int] = tuple(range(len(recipe.widths)))
        self._setup = Setup(self.objective, setup.optimizer, setup.device, setup.host)
        with setup.host():
            self._away = [self._block(number, state) for number in self.sources]
        self._resident: dict[int, ResidentCell] = {}

    def tile(self, number: int) -> ResidentCell:
        """See ``Tiled``."""
        if number in self._resident:
            return self._resident[number]
        width = self._recipe.widths[number]
        recipe = CellRecipe(f"block {number + 1}", (width,), (width,), nn.Identity, ("classifier", width))
        node = Node(self.index, recipe, (width,), self._recipe.seed, Input((width,), self._recipe.seed))
        with torch.device("meta"):
            head = nn.Linear(width, self.objective.classes, bias=number == 0)
        tile = ResidentCell(node, self._setup, self._away[number], (nn.Identity(), head))
        if self._recipe.resident:
            self._resident[number], self._away[number] = tile, CellState()
        return tile

    def keep(self, number: int, tile: ResidentCell) -> None:
        """See ``Tiled``."""
        if number not in self._resident:
            self._away[number] = tile.state_dict()

    def state_dict(self, room: CellState | None = None) -> CellState:
        """See ``Cell``: block l is ``head.l.weight``, and the bias ``head.0.bias``."""
        whole = CellState()
        for number, state in enumerate(self._away):
            if number in self._resident:
                state = self._resident[number].state_dict()
            whole.head |= {f"{number}.{name}": value for name, value in state.head.items()}
            whole.optimizer |= {
                (phase, f"head.{number}.{owner.removeprefix('head.')}", key): value
                for (phase, owner, key), value in state.optimizer.items()
            }
        return whole

    def _block(self, number: int, state: CellState | None) -> CellState:
        """A block's part of the state, or its first weights."""
        if state is None:
            return CellState(head=self._first(number))
        prefix = f"{number}."
        return CellState(
            {},
            {name.removeprefix(prefix): value for name, value in state.head.items() if name.startswith(prefix)},
            {
                (phase, f"head.{owner.removeprefix('head.' + prefix)}", key): value
                for (phase, owner, key), value in state.optimizer.items()
                if owner.startswith("head." + prefix)
            },
        )

    def _first(self, number: int) -> Tensors:
        """Values as one linear map on the concatenation would draw them: uniform within 1/sqrt(inputs)."""
        bound, classes = self.units**-0.5, self.objective.classes
        shapes: dict[str, tuple[int, ...]] = {"weight": (classes, self._recipe.widths[number])}
        if number == 0:
            shapes["bias"] = (classes,)
        return {
            name: torch.empty(shape).uniform_(
                -bound, bound, generator=generator("cpu", self._recipe.seed, "classifier", number, name)
            )
            for name, shape in shapes.items()
        }
