"""What the planner must know of a run; the trainer carries out the same."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from edgetrain.data.augment import Augmentation
from edgetrain.objectives.base import Node, Objective
from edgetrain.planning.schedule import SCHEDULES, Cut, Visit
from edgetrain.store.rows import RowFormat
from edgetrain.stream.builder import Builder
from edgetrain.stream.classifier import ClassifierRecipe
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.state import Host


@dataclass(frozen=True)
class Workload:
    """A run without its data.

    Attributes:
        nodes: the cells.
        objective: the local rule.
        optimizer: of each cell.
        classifier: optimizer of the trained classifier, or ``None`` if the method has none.
        schedule: name of the order of visits.
        classes: number of classes.
        rows: training samples.
        test_rows: test and validation samples.
        batch_size: samples of a step.
        epochs: of each cell.
        classifier_epochs: of the classifier; 0 if there is none.
        inputs: how a prepared input lies on disk.
        latent_dtype: how latents lie on disk.
        device: where steps run.
        seed: the run's.
        prefetch: batches gathered ahead.
        views: of the data set that finished cells cache.
        augmentation: of what the first cell learns from, or ``None``.
        keep_latents: whether latents stay on disk when they are no longer needed.
        evaluate_every: epochs between evaluations in the course of training; ``None``: there are none.
        patience: evaluations without a higher accuracy after which a cell, or the run, is stopped; ``None``: never.
    """

    nodes: tuple[Node, ...]
    objective: Objective
    optimizer: OptimizerRecipe
    classifier: OptimizerRecipe | None
    schedule: str
    classes: int
    rows: int
    test_rows: int
    batch_size: int
    epochs: int
    classifier_epochs: int
    inputs: RowFormat
    latent_dtype: str
    device: torch.device
    seed: int
    prefetch: int
    views: int = 1
    augmentation: Augmentation | None = None
    keep_latents: bool = False
    evaluate_every: int | None = None
    patience: int | None = None

    def tileable(self, node: Node) -> bool:
        """Whether a cell can be trained in tiles: by its rule, and without the norm of all its gradients."""
        return self.optimizer.clip_norm is None and self.objective.tileable(node)

    @property
    def steps(self) -> int:
        """Optimisation steps of an epoch; the short last batch is kept."""
        return -(-self.rows // self.batch_size)

    def visits(self, cut: Cut) -> list[Visit]:
        """Of the whole run, in order."""
        schedule = SCHEDULES[self.schedule]
        return list(schedule(self.depth, self.epochs, self.steps, self.classifier_epochs, self.classifier_reads, cut))

    def range_rows(self, cut: Cut) -> int:
        """Samples of the largest range of an epoch."""
        first, last = cut.steps(self.steps)[0]
        return min((last - first) * self.batch_size, self.rows)

    @property
    def depth(self) -> int:
        """Number of cells; also the classifier's number as a node."""
        return len(self.nodes)

    @property
    def streams_layers(self) -> bool:
        """Whether every step goes forward through all cells and back; see ``stream/streamed.py``."""
        return self.objective.streams_layers

    def kind(self, index: int) -> Hashable:
        """Equal for cells whose visits are the same program."""
        node = self.nodes[index]
        last = self.streams_layers and node.is_last
        return node.recipe.signature, node.parent.shape, index == 0, self.emits(index), last

    @property
    def emits_in_training(self) -> bool:
        """Whether cells emit latents while they train."""
        return self.schedule == "sequence"

    @property
    def classifier_reads(self) -> tuple[int, ...]:
        """The cells whose latents the trained classifier reads."""
        return self.objective.read_by_classifier(self.depth) if self.classifier is not None else ()

    @property
    def feature_widths(self) -> list[int]:
        """Numbers that the trained classifier reads of each of these cells."""
        shapes = [self.nodes[index].shape for index in self.classifier_reads]
        return [self.objective.features(torch.empty(1, *shape, device="meta")).shape[1] for shape in shapes]

    def builder(self, device: torch.device, host: Host, classifier_resident: bool = False) -> Builder:
        """What builds the run's cells, on another device than the run's in a dry run."""
        recipe = ClassifierRecipe(self.depth, self.feature_widths, self.seed, classifier_resident)
        optimizers = self.optimizer, self.classifier
        return Builder(self.nodes, self.objective, optimizers, device, host, recipe)

    def sources_of(self, index: int) -> tuple[int, ...]:
        """Numbers of the latents that a node reads: one, or those of all cells that the classifier reads."""
        if self.streams_layers:
            return (0,)
        return (index,) if index < self.depth else tuple(read + 1 for read in self.classifier_reads)

    def reads_inputs(self, index: int) -> bool:
        """Whether a node reads the prepared inputs."""
        return self.sources_of(index) == (0,)

    def streams_of(self, index: int) -> tuple[str, ...]:
        """Names of the streams that a node reads."""
        if index == self.depth:
            return (self.objective.classifier_stream,)
        return ("x",) if self.reads_inputs(index) else self.objective.stream_names

    def format_into(self, index: int) -> RowFormat:
        """How one stream of the latents that node ``index`` reads lies on disk."""
        return self.inputs if index == 0 else RowFormat(self.nodes[index - 1].shape, self.latent_dtype)

    def formats_into(self, index: int) -> dict[str, RowFormat]:
        """How all streams of latents ``index`` lie on disk."""
        names = ("x",) if index == 0 else self.objective.stream_names
        return dict.fromkeys(names, self.format_into(index))

    def row_bytes_into(self, index: int) -> int:
        """Bytes on disk of one sample that node ``index`` reads, all streams together."""
        return sum(layout.row_bytes for layout in self.formats_into(index).values())

    def emits(self, index: int) -> bool:
        """Whether anybody reads the latents of node ``index``."""
        if self.streams_layers:
            return False
        return index in self.classifier_reads or index < self.depth - 1

    def couples_batch(self, index: int) -> bool:
        """Whether node ``index`` cannot be split into micro-batches."""
        nodes = self.nodes if self.streams_layers else (self.nodes[index],)  # these share their micro-batches
        return self.objective.couples_batch or any(node.recipe.couples_batch for node in nodes)

    def needs_values(self, index: int) -> bool:
        """Whether node ``index`` cannot run on fake tensors."""
        return index < self.depth and self.nodes[index].recipe.needs_values
