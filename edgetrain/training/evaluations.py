"""Accuracy in the course of training: measured every few epochs, kept in the record, and a reason to stop early.

Under ``separate`` a cell is evaluated together with the finished cells before it, by its own vote; otherwise the whole
net, by the vote of its method. Rows are the validation rows if some were held out; only by these is a run stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgetrain.data.prepare import Prepared
from edgetrain.memory.meter import Meter
from edgetrain.planning.plan import Plan
from edgetrain.planning.schedule import Visit
from edgetrain.planning.workload import Workload
from edgetrain.record import CellRecord, Evaluation
from edgetrain.store.run import RunFolder
from edgetrain.stream.cells import CellStream
from edgetrain.stream.latents import FileLatents
from edgetrain.training.predictor import Predictor
from edgetrain.units import to_mb


@dataclass(frozen=True)
class Evaluations:
    """Evaluates a run's cells while they are trained.

    Attributes:
        work: the run.
        plan: its plan.
        folder: for latents on their way.
        rows: with labels.
        meter: watches the device side.
        cells: between their visits.
        records: of the cells and the classifier; take the accuracies.
    """

    work: Workload
    plan: Plan
    folder: RunFolder
    rows: Prepared
    meter: Meter
    cells: CellStream
    records: list[CellRecord]

    def due(self, visit: Visit) -> bool:
        """Whether to evaluate after a visit: it ends an epoch whose turn it is."""
        every = self.work.evaluate_every
        ends = visit.trains and visit.frontier and visit.last == self.work.steps
        by_itself = self.work.schedule == "separate" and visit.node == self.work.depth  # a classifier
        return every is not None and ends and not by_itself and (visit.epoch + 1) % every == 0

    def evaluate(self, visit: Visit) -> None:
        """Measure accuracies after a visit; the device must be free."""
        work = self.work
        alone = work.schedule == "separate"
        depth = visit.node + 1 if alone else work.depth
        trains_classifier = not alone and work.classifier is not None
        predictor = Predictor(
            nodes=work.nodes[:depth],
            objective=work.objective,
            device=work.device,
            meter=self.meter,
            seed=work.seed,
            micro_batches=self.plan.micro_batches,
            tiles=self.plan.tiles,
            seeds=[cell.evaluation_seed for cell in self.plan.cells],
            read_cell=self.cells.weights,
            classifier=self.cells.weights(work.depth) if trains_classifier else None,
            folder=self.folder.latents,
        )
        found = predictor.run(FileLatents.of_files({"x": self.rows.x}, self.meter.host), self.rows.y, whole=True)
        whole = found.accuracy.get(work.objective.vote)
        for index in [depth - 1] if alone else range(depth):
            self._keep(index, visit.epoch, found.cells[index], whole)
        if visit.node == work.depth:
            self._keep(visit.node, visit.epoch, found.accuracy.get("classifier"), whole)
        for record, peak in zip(self.records, found.peaks, strict=False):
            record.peak_gpu_mb = max(record.peak_gpu_mb or 0.0, to_mb(peak) or 0.0)

    def is_over(self, visit: Visit) -> bool:
        """Whether training ended before a visit: the accuracy has not risen for as long as patience lasts."""
        if self.work.patience is None or not visit.trains:
            return False
        alone = self.work.schedule == "separate"
        judged = visit.node if alone else len(self.records) - 1
        seen = [each.accuracy if alone else each.net_accuracy for each in self.records[judged].evaluations]
        known = [accuracy for accuracy in seen if accuracy is not None]
        return bool(known) and len(known) - 1 - known.index(max(known)) >= self.work.patience

    def _keep(self, index: int, epoch: int, accuracy: float | None, net_accuracy: float | None) -> None:
        self.records[index].evaluations.append(Evaluation(epoch + 1, accuracy, net_accuracy))
