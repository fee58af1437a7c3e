"""Rules whose loss sees a cell only through a statistic that is a sum over the cell's units.

Such a rule says two things: the statistic S [B, m] of a cell, and the loss of a given S. Everything else follows,
also a step with one tile of the cell's units on the device at a time (``stream.sweeps``): S is then the sum of the
tiles' parts. Mono-Forward's S are the logits, an autoencoder's the reconstruction before its rectification.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from edgetrain.objectives.base import Batch, Node, Objective, Step, Streams


class StatisticObjective(Objective):
    """A rule with a statistic. ``loss``, ``read`` and the step in tiles are derived.

    Attributes:
        tile_axes: of the head's tensors that belong to the cell's units, by name, the axis of the units; others that
            are learned belong to the first tile, and must enter the statistic as a sum does. ``None``: the rule
            cannot be trained in tiles.
    """

    tile_axes: ClassVar[Mapping[str, int] | None] = MappingProxyType({})

    @abstractmethod
    def statistic(
        self, cell: nn.Module, head: Any, streams: Streams, units: int | None = None
    ) -> tuple[Tensor, Streams]:
        """The statistic S [B, m] of a cell or of a tile of it, and its latents.

        Args:
            cell: the module of the cell or tile.
            head: its head.
            streams: the parent's latents [B, ...].
            units: of the whole cell, where ``cell`` is a tile of it; ``None``: it is whole.
        """

    @abstractmethod
    def loss_from(self, statistic: Tensor, head: Any, batch: Batch) -> Step:
        """The local loss, a sum over the samples, from the whole statistic.

        Args:
            statistic: S [B, m] with its graph; it may be changed in place.
            head: the cell's head; of a cell in tiles what ``fixed_head`` gives.
            batch: the micro-batch.
        """

    def scores_from(self, statistic: Tensor) -> Tensor | None:
        """The cell's vote [B, C] from the statistic of unlabelled streams; ``None``: it has none."""
        return None

    def loss(self, phase: str, cell: nn.Module, head: Any, batch: Batch) -> Step:
        """See ``Objective.loss``."""
        statistic, latents = self.statistic(cell, head, batch.streams)
        step = self.loss_from(statistic, head, batch)
        return replace(step, emitted={name: values.detach() for name, values in latents.items()})

    def read(self, cell: nn.Module, head: Any, streams: Streams) -> tuple[Streams, Tensor | None]:
        """See ``Objective.read``."""
        statistic, latents = self.statistic(cell, head, streams)
        return latents, self.scores_from(statistic)

    # -- tiles -------------------------------------------------------------------------------------

    def tileable(self, node: Node) -> bool:
        """See ``Objective.tileable``."""
        recipe = node.recipe
        plain = recipe.narrower is not None and not (recipe.draws or recipe.couples_batch)
        return plain and self.tile_axes is not None

    def tile_head(self, node: Node, tile: Node, units: slice) -> nn.Module | None:
        """The head of a tile; its learned values come from the cell's.

        Args:
            node: the whole cell.
            tile: a node of the tile's shape.
            units: which of the cell's units the tile holds.
        """
        return self.head(tile)

    def fixed_head(self, node: Node) -> nn.Module | None:
        """What of the head is not learned but needed by ``loss_from``."""
        return None

    @property
    def learned_streams(self) -> tuple[str, ...]:
        """The streams that the loss depends on."""
        return self.stream_names
