"""Builds the cells of a run: whole on the device, in tiles, or the classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgetrain.objectives.base import Node, Objective
from edgetrain.stream.cell import Cell, Modules, Setup
from edgetrain.stream.classifier import Classifier, ClassifierRecipe
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.state import CellState, Host
from edgetrain.stream.streamed import StreamedLayer
from edgetrain.stream.tiles import build_cell


@dataclass(frozen=True)
class Builder:
    """Builds any node of a run's schedule.

    Attributes:
        nodes: the cells.
        objective: the local rule.
        optimizers: of the cells, and of the classifier (``None``: there is none).
        device: where cells are.
        host: the meter's scope for host tensors.
        classifier: what the classifier is made of, if there is one.
    """

    nodes: tuple[Node, ...]
    objective: Objective
    optimizers: tuple[OptimizerRecipe, OptimizerRecipe | None]
    device: torch.device
    host: Host
    classifier: ClassifierRecipe

    def build(self, index: int, tiles: int = 1, state: CellState | None = None, shapes: Modules | None = None) -> Cell:
        """The cell of a node.

        Args:
            index: of the node; the number of cells for the classifier.
            tiles: number of tiles in which the cell is trained.
            state: host tensors to start from; ``None``: first weights, drawn from the cell's key.
            shapes: cell and head on the meta device, to be given room but no values (a dry run).
        """
        of_cells, of_classifier = self.optimizers
        if index < len(self.nodes) and self.objective.streams_layers:
            return StreamedLayer(self.nodes[index], self._setup(of_cells), state, shapes)
        if index < len(self.nodes):
            return build_cell(self.nodes[index], self._setup(of_cells), tiles, state, shapes)
        assert of_classifier is not None, "only a run that trains a classifier visits it"
        return Classifier(self.classifier, self._setup(of_classifier), state)

    def _setup(self, optimizer: OptimizerRecipe) -> Setup:
        return Setup(self.objective, optimizer, self.device, self.host)
