"""Reads classes off a finished net, one cell on the device at a time, over all rows at once.

The votes: ``sum`` of all cells' scores, the ``last`` cell's alone, the trained ``classifier`` on all
cells' latents (a sum over cells as well, so nothing is concatenated), and each cell on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgetrain.errors import CorruptError, StorageError
from edgetrain.memory import device as devices
from edgetrain.memory.meter import Meter
from edgetrain.objectives.base import Node, Objective, Streams
from edgetrain.store.latents import LatentFile
from edgetrain.stream.cell import Setup, copied
from edgetrain.stream.executor import Executor
from edgetrain.stream.inputs import evaluation_inputs
from edgetrain.stream.latents import FileLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.outputs import Outputs
from edgetrain.stream.reader import LabelFile, Reader
from edgetrain.stream.span import Span
from edgetrain.stream.state import CellState
from edgetrain.stream.tiles import build_cell

_UNUSED = OptimizerRecipe("sgd", 1.0)


@dataclass
class Predictions:
    """Scores [rows, C], float32, by vote, and accuracies where there are labels.

    Attributes:
        scores: by vote.
        accuracy: fraction right, by vote.
        cells: fraction right of each cell on its own; ``None`` for cells that have no vote.
        peaks: device bytes of each cell's visit.
        missing: what is wrong with the first cell that could not be read, so that the cells before it vote
            without it; empty if all are there.
        data: which rows these are, in words, if they were evaluated; ``rows``: how many.
    """

    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    cells: list[float | None] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    missing: str = ""
    data: str = ""
    rows: int = 0


@dataclass(frozen=True)
class Predictor:
    """A finished net that streams.

    Attributes:
        nodes: its cells.
        objective: the rule it was trained with.
        device: where cells run.
        meter: watches the device side.
        seed: the run's.
        micro_batches: of each cell.
        tiles: of each cell.
        seeds: bytes of the block that is taken and given back before each cell comes; see ``planning.seeding``.
        read_cell: gives a cell's tensors.
        classifier: the trained classifier, if there is one.
        folder: for latents on their way; they are removed.
        prefetch: batches gathered ahead.
    """

    nodes: tuple[Node, ...]
    objective: Objective
    device: torch.device
    meter: Meter
    seed: int
    micro_batches: list[int]
    tiles: list[int]
    seeds: list[int]
    read_cell: Callable[[int], CellState]
    classifier: CellState | None
    folder: Path
    prefetch: int = 2

    def run(
        self,
        inputs: FileLatents,
        labels: LatentFile | None,
        on_latents: Callable[[int, NDArray[np.float32]], None] | None = None,
        whole: bool = False,
    ) -> Predictions:
        """Scores of all rows of ``inputs``.

        Where a cell cannot be read, the cells before it vote without it and those behind it, unless the net is
        asked for as a ``whole``.

        Args:
            inputs: prepared rows.
            labels: of the rows, or ``None``.
            on_latents: given the last cell's latents [B, ...] with the number of their first row.
            whole: refuse to go without a cell.

        Raises:
            EdgetrainError: the first cell cannot be read, or one that is needed.
        """
        truth = None if labels is None else _all_labels(labels)
        found = Predictions()
        source = inputs
        for node in self.nodes:
            is_last = node.index == len(self.nodes) - 1
            try:
                state = self.read_cell(node.index)
            except (CorruptError, StorageError) as error:
                if whole or node.index == 0 or on_latents is not None:
                    raise
                number = node.index + 1
                found.missing = f"the {node.index} cells before cell {number} predict without it: {error}"
                break
            scorer = _Scorer(self, node, found, truth, on_latents if is_last else None)
            out = None if is_last else self._latents(node.index, inputs.rows)
            self._visit(node, state, source, labels, out, scorer)
            if source is not inputs:
                source.free()
            source = inputs if out is None else out
            scorer.conclude()
        if source is not inputs:
            source.free()
        if truth is not None:
            for vote, scores in found.scores.items():
                found.accuracy[vote] = _accuracy(scores, truth)
        return found

    def _visit(
        self,
        node: Node,
        state: CellState,
        source: FileLatents,
        labels: LatentFile | None,
        target: FileLatents | None,
        scorer: _Scorer,
    ) -> None:
        micro = self.objective.evaluation_batch(self.micro_batches[node.index])
        tiles = self.tiles[node.index]
        self.meter.start_cell(("evaluate", node.index))
        devices.seed_pool(self.device, self.seeds[node.index])
        with self.meter.watch():
            cell = build_cell(node, Setup(self.objective, _UNUSED, self.device, self.meter.host), tiles, state)
        span = Span(source.rows, micro, micro, 0, -(-source.rows // micro))
        scorer.load(latents_on_host=cell.tiles > 1)
        prepare = evaluation_inputs(self.objective) if node.index == 0 else None
        reader = Reader([source.source()], LabelFile(labels), self.device, self.meter.host, self.prefetch, prepare)
        sink = None if target is None else target.sink()
        try:
            out = Outputs(sink=sink, on_scores=scorer.take)
            Executor(self.meter, self.seed).run("evaluate", cell, reader, span, out)
        finally:
            if sink is not None:
                sink.close()
        scorer.peak = self.meter.cell_peak

    def _latents(self, index: int, rows: int) -> FileLatents:
        def ignore(size: int) -> None: ...

        return FileLatents(
            self.folder,
            f"rows-{index + 1:03}",
            rows,
            "float32",
            False,
            self.meter.host,
            ignore,
            ignore,
            background=self.prefetch > 0,
            device=self.device,
        )


class _Scorer:
    """Collects one cell's part of the votes."""

    def __init__(
        self,
        predictor: Predictor,
        node: Node,
        found: Predictions,
        truth: NDArray[np.int64] | None,
        on_latents: Callable[[int, NDArray[np.float32]], None] | None,
    ):
        self._predictor, self._node, self._found, self._truth = predictor, node, found, truth
        self._on_latents = on_latents
        self._block: Tensor | None = None
        self._bias: Tensor | None = None
        self._own: list[NDArray[np.float32]] = []
        self._trained: list[NDArray[np.float32]] = []
        self._on_host = False
        self.peak = 0

    def load(self, latents_on_host: bool) -> None:
        """Bring the classifier's block for this cell to the device, and say where the cell's latents will be."""
        self._on_host, predictor = latents_on_host, self._predictor
        classifier, device = predictor.classifier, predictor.device
        reads = predictor.objective.read_by_classifier(len(predictor.nodes))
        if classifier is None or self._node.index not in reads:
            return
        with predictor.meter.watch():
            block = reads.index(self._node.index)
            self._block = copied(classifier.head[f"{block}.weight"], device)
            if block == 0:
                self._bias = copied(classifier.head["0.bias"], device)

    def take(self, start: int, scores: Tensor | None, latents: Streams) -> None:
        """See ``stream.outputs.OnScores``."""
        if scores is not None:
            self._own.append(_to_numpy(scores))
        if self._block is not None:
            objective = self._predictor.objective
            read = latents[objective.classifier_stream]
            read = copied(read, self._predictor.device) if self._on_host else read
            logits = objective.features(read) @ self._block.T
            self._trained.append(_to_numpy(logits if self._bias is None else logits + self._bias))
        if self._on_latents is not None:
            stream = self._predictor.objective.classifier_stream
            self._on_latents(start, _to_numpy(latents[stream]))

    def conclude(self) -> None:
        """Add this cell's scores to the votes."""
        found = self._found
        found.peaks.append(self.peak)
        own = np.concatenate(self._own) if self._own else None
        if own is None or self._truth is None:
            found.cells.append(None)
        else:
            found.cells.append(_accuracy(own, self._truth))
        if own is not None:
            found.scores["sum"] = found.scores["sum"] + own if "sum" in found.scores else own
            found.scores["last"] = own
        if self._trained:
            trained = np.concatenate(self._trained)
            before = found.scores.get("classifier")
            found.scores["classifier"] = trained if before is None else before + trained


def _to_numpy(values: Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy().copy()


def _all_labels(labels: LatentFile) -> NDArray[np.int64]:
    rows = torch.empty(labels.rows, labels.format.row_bytes, dtype=torch.uint8)
    labels.read(slice(0, labels.rows), rows)
    return labels.format.decode(rows).numpy()


def _accuracy(scores: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    return float((scores.argmax(1) == truth).mean())
