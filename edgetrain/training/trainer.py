"""Carries visits out: fetches the cell, reads its batches, trains it, keeps what it emits, saves checkpoints.

Read `_visit` first: it is the whole of training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from edgetrain.data.prepare import Prepared
from edgetrain.errors import BudgetError, CorruptError, Stopped
from edgetrain.keys import epoch_order
from edgetrain.memory import device as devices
from edgetrain.memory.host import freed_memory_is_kept
from edgetrain.memory.meter import Meter
from edgetrain.planning.plan import Plan
from edgetrain.planning.schedule import Visit, frontier_before
from edgetrain.planning.workload import Workload
from edgetrain.record import CellRecord, Sums
from edgetrain.store.latents import LatentFile
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import Cell, Learner
from edgetrain.stream.cells import CellStream
from edgetrain.stream.executor import Executor
from edgetrain.stream.inputs import training_inputs
from edgetrain.stream.latents import DeviceLatents, FileLatents, Latents
from edgetrain.stream.outputs import Outputs, Tally
from edgetrain.stream.reader import LabelFile, Reader, Source
from edgetrain.stream.span import Span
from edgetrain.stream.state import CellState, Tensors
from edgetrain.stream.streamed import Between, StreamedNet
from edgetrain.training.callbacks import Callback, Progress
from edgetrain.training.checkpointing import Checkpoints, Digests, Position
from edgetrain.training.diagnostics import Diagnostics
from edgetrain.training.evaluations import Evaluations
from edgetrain.training.latent_cache import LatentCache
from edgetrain.training.stopping import Stop
from edgetrain.training.system_monitor import SystemMonitor
from edgetrain.units import show_mb, stated_mb, to_mb

_SHOW_EVERY_S = 0.25


@dataclass(frozen=True)
class Choices:
    """What a trainer is free to choose without changing a bit of the result.

    Attributes:
        host_tier: bytes of host memory for cells between visits.
        prefetch: batches gathered ahead.
        keep_latents: leave latents that nobody needs any more.
        checkpoint_every: seconds between checkpoints, or ``None``.
    """

    host_tier: int
    prefetch: int
    keep_latents: bool
    checkpoint_every: float | None


class Trainer:
    """One run's training, from its newest checkpoint to its end.

    Args:
        work: the run.
        plan: micro-batches and placement.
        folder: where checkpoints and latents go.
        inputs: latents 0.
        labels: of the training rows.
        input_state: how inputs were scaled, saved with the cells.
        meter: watches the device side.
        callback: receives progress and notes.
        choices: see ``Choices``.
        stop: asked whether to end early.
        energy: joules of the device so far, or ``None``.
        evaluated: rows with which cells are evaluated in the course of training.
    """

    def __init__(
        self,
        work: Workload,
        plan: Plan,
        folder: RunFolder,
        inputs: FileLatents,
        labels: LatentFile,
        input_state: Tensors,
        digests: Digests,
        meter: Meter,
        callback: Callback,
        choices: Choices,
        stop: Stop,
        energy: Callable[[], float | None],
        evaluated: Prepared | None = None,
    ):
        self._work, self._plan, self._meter = work, plan, meter
        self._labels, self._callback, self._choices, self._stop = labels, callback, choices, stop
        self._resident = plan.placement == "resident"
        self._executor = Executor(meter, work.seed)
        self._builder = work.builder(work.device, meter.host, plan.classifier_resident)
        self._cells = CellStream(
            self._place, work.device, meter, folder.units, choices.host_tier, self._resident, not work.streams_layers
        )
        self._streamed = self._streamed_net(folder) if work.streams_layers else None
        self._files: FileLatents = inputs
        self._latents = LatentCache(
            work, plan.cut, folder, self._resident, meter.host, choices.prefetch > 0, choices.keep_latents
        )
        self._label_source: Source = LabelFile(labels)
        self.records = [
            CellRecord(
                cell.name,
                cell.params,
                predicted_peak_mb=to_mb(cell.peak),
                micro_batch=cell.micro_batch,
                tiles=cell.tiles,
            )
            for cell in plan.visits
        ]
        self._evaluations = (
            None if evaluated is None else Evaluations(work, plan, folder, evaluated, meter, self._cells, self.records)
        )
        self._monitor = SystemMonitor(work.device, plan.budget, callback.note)
        self._diagnostics = Diagnostics(work, self.records, callback.warn)
        self.checkpoints = Checkpoints(
            folder, work.nodes, self._cells, self._latents, self.records, input_state, digests,
            self._monitor, choices.checkpoint_every, stop.began, energy,
        )  # fmt: skip
        self._visits = work.visits(plan.cut)
        self._resumed = Position.before(0, self._visits)
        self._checkpoint_soon = False
        self._started = self._last_shown = self._visit_began = time.monotonic()

    @property
    def latents_peak(self) -> int:
        """The most bytes of latents in files at once."""
        return self._latents.peak

    def run(self) -> None:
        """Train from the newest checkpoint to the end, and save that.

        Raises:
            DivergedError: a loss is not finite.
            StorageError: the disk refused; the newest checkpoint holds.
            Stopped: it was asked for; what was done is in a checkpoint.
        """
        try:
            with freed_memory_is_kept() if self._work.streams_layers else nullcontext():
                self._carry_out()
        finally:
            self._end()

    def _carry_out(self) -> None:
        visits = self._visits
        position = self._resumed = self.checkpoints.restore(visits)
        if position.done == len(visits):
            return
        self._take_up(position)
        for number, (visit, following) in enumerate(pairwise([*visits, None])):
            if number < position.done:
                continue
            assert visit is not None
            begun = position if number == position.visit else Position.before(number, visits)
            if self._evaluations is not None and self._evaluations.is_over(visit):
                self._leave_out(number, visit, following)
            else:
                self._visit(begun, visit, following)
                self._evaluate(visit)
            if following is not None and visit.frontier and self._checkpoint_due(number + 1):
                self._save(Position.before(number + 1, visits))
        self._cells.leave()
        self._save(Position.before(len(visits), visits))

    def _take_up(self, position: Position) -> None:
        """Bring everything to where the newest checkpoint stood."""
        if position != Position.before(0, self._visits):
            self._callback.note(f"resuming {self._where(position)}; finished cells emit their latents again")
        self._begin()
        for visit in self._visits[: position.done]:
            if not self._replay(visit):
                raise self._stopped("while latents were emitted again")
        with self._meter.watch():
            self._checkpoint_soon = self.checkpoints.restore_latents(self._work.device)
        read = self._visits[position.visit].node
        if self._work.emits_in_training and read < self._work.depth and read not in self._latents:
            raise CorruptError(f"the journal's newest checkpoint lacks the latents that cell {read + 1} reads")

    # -- one visit ---------------------------------------------------------------------------------

    def _visit(self, begun: Position, visit: Visit, following: Visit | None) -> None:
        self._visit_began = start = time.monotonic()
        if not visit.trains:
            if not self._emit_range(visit, following):
                if begun.visit < self._resumed.visit:  # nothing was trained since the newest checkpoint
                    raise self._stopped("while latents were emitted again")
                self._halt(Position.before(self._frontier(begun.visit), self._visits))
            self._latents.free(visit.frees)
            self._clock(visit.node)
            return
        sums, waited = self._train(begun, visit, following)
        self._latents.free(visit.frees)
        loss, accuracy = sums.means
        record, size = self.records[visit.node], self._work.batch_size
        if sums.samples:
            record.add(visit.epoch, visit.first * size / min(visit.last * size, self._work.rows), loss, accuracy)
            if self._streamed is not None:
                for each in self.records:
                    each.epochs = record.epochs
        record.waited_seconds += waited
        self._clock(visit.node)
        if visit.last > begun.step:
            self._monitor.visited(visit.node, visit.last - begun.step, time.monotonic() - start)
        if sums.samples:
            self._diagnostics.visited(visit)
        if sums.samples:
            self._callback.visited(self._progress(begun.visit, visit, visit.last, sums))

    def _train(self, begun: Position, visit: Visit, following: Visit | None) -> tuple[Sums, float]:
        cell: Learner = self._streamed or self._cells.visit(visit.node)
        if following is not None and following.node != visit.node:
            self._cells.expect(following.node, following.trains)
        reader = self._reader(visit.node)
        emits = visit.emit == "training"
        out = self._latents.make(visit, goes_on=begun.step > visit.first) if emits else None
        self._diagnostics.begins(visit, cell, begun.step == visit.first)

        def train(first: int, tally: Tally, pause: Callable[[int], bool]) -> int:
            sink = None if out is None else out.sink()
            try:
                span = self._span(visit, first)
                return self._executor.train(cell, reader, span, Outputs(tally, sink), pause)
            finally:
                if sink is not None:
                    sink.close()

        sums = self._between_checkpoints(begun, visit, train)
        self._diagnostics.trained(visit, cell)
        if visit.emit == "finished":
            out = self._latents.make(visit)
            if not self._emit(self._cells.visit(visit.node), reader, out):
                self._halt(Position(self._frontier(begun.visit), begun.visit, visit.last, sums))
        if out is not None:
            self._diagnostics.emitted(visit, out)
        if self._streamed is None:
            self._note_peak(visit.node)
        return sums, reader.waited_s

    def _leave_out(self, number: int, visit: Visit, following: Visit | None) -> None:
        """Pass over a visit of training that has ended early; a cell that is finished with it emits its latents."""
        if visit.emit == "finished":
            self._visit(Position(number, number, visit.last), visit, following)
        else:
            self._latents.free(tuple(index for index in visit.frees if index in self._latents))

    def _evaluate(self, visit: Visit) -> None:
        """Measure accuracies after a visit, if it is time, with no cell on the device."""
        if self._evaluations is not None and self._evaluations.due(visit):
            self._cells.leave()
            self._evaluations.evaluate(visit)
            if self._evaluations.is_over(visit) and not visit.final:
                what = f"cell {visit.node + 1}" if self._work.schedule == "separate" else "training"
                self._callback.note(f"{what} ends after epoch {visit.epoch + 1}: its validation accuracy rises no more")

    def _between_checkpoints(
        self, begun: Position, visit: Visit, train: Callable[[int, Tally, Callable[[int], bool]], int]
    ) -> Sums:
        """Train all steps of a visit, with checkpoints between them when they are due.

        Args:
            begun: where the visit begins, or continues.
            visit: which.
            train: does steps from one on until the visit ends or it is told to pause; returns where it stands.

        Raises:
            Stopped: it was asked for; the steps that were done are in a checkpoint.
        """
        step, tally = begun.step, self._tally(visit, begun.sums)

        def pause(done: int) -> bool:
            self._show(begun.visit, visit, done + 1, tally)
            return self._stop.asked() or self._checkpoint_due_within(begun.visit, visit, done + 1)

        while step < visit.last:
            step = train(step, tally, pause)
            stopping, unfinished = self._stop.asked(), step < visit.last or visit.emit == "finished"
            if stopping or (unfinished and self._checkpoint_due_within(begun.visit, visit, step)):
                self._clock(visit.node)
                position = Position(self._frontier(begun.visit), begun.visit, step, self._read(tally, visit))
                if stopping:
                    self._halt(position)
                self._save(position)
                self._cells.changes_on()
        return self._read(tally, visit)

    def _emit_range(self, visit: Visit, following: Visit | None) -> bool:
        """Let a finished cell emit a range of its latents again; whether it finished."""
        work, node = self._work, visit.node
        cell = self._cells.visit(node, changes=False)
        if following is not None and following.node not in (node, work.depth):
            self._cells.expect(following.node, following.trains)
        order = epoch_order(work.seed, visit.epoch, work.rows) if visit.emit == "again" else None
        micro = self._plan.micro_batches[node]
        span = Span(work.rows, work.batch_size, micro, visit.first, visit.last, order)
        whole = self._emit_span(cell, self._reader(node), self._latents.make(visit), span)
        self._note_peak(node)
        return whole

    def _emit(self, cell: Cell, reader: Reader, out: Latents) -> bool:
        """Latents of the finished cell, in sample order, view by view; whether all were emitted."""
        work, index = self._work, cell.index
        micro = self._plan.micro_batches[index]
        spans = (
            Span(work.rows, work.batch_size, micro, 0, work.steps, view=view if index else 0, epoch=view)
            for view in range(work.views)
        )
        return all(self._emit_span(cell, reader, out, span) for span in spans)

    def _emit_span(self, cell: Cell, reader: Reader, out: Latents, span: Span) -> bool:
        """Emit until the end, or until the run is to stop; whether it finished."""
        sink = out.sink()
        outputs = Outputs(sink=sink, base=span.epoch * span.rows)
        try:
            return self._executor.run("emit", cell, reader, span, outputs, lambda step: self._stop.asked()) == span.last
        finally:
            sink.close()

    # -- what a visit needs ------------------------------------------------------------------------

    def _place(self, index: int, state: CellState | None) -> Cell:
        devices.seed_pool(self._work.device, self._plan.visits[index].seed)
        return self._builder.build(index, self._plan.tiles[index], state)

    def _streamed_net(self, folder: RunFolder) -> StreamedNet:
        work, plan = self._work, self._plan
        between = Between(
            min(work.batch_size, work.rows), self._meter.host, folder.units.scratch if plan.spills_batch else None
        )
        return StreamedNet(work.depth, self._cells, between, self._layer_done)

    def _span(self, visit: Visit, first: int) -> Span:
        """The visit's steps from ``first`` on."""
        work = self._work
        order = epoch_order(work.seed, visit.epoch, work.rows)
        micro = self._plan.micro_batches[visit.node]
        view = visit.epoch % work.views if visit.node else 0  # there is one view of the inputs
        return Span(work.rows, work.batch_size, micro, first, visit.last, order, view, visit.epoch)

    def _reader(self, index: int) -> Reader:
        work, streams = self._work, self._work.streams_of(index)
        sources = [self._latents[number].source(streams) for number in work.sources_of(index)]
        prepare = training_inputs(work.objective, work.augmentation) if work.reads_inputs(index) else None
        ahead = self._choices.prefetch
        return Reader(sources, self._label_source, work.device, self._meter.host, ahead, prepare)

    def _tally(self, visit: Visit, before: Sums) -> Tally:
        name = self.records[visit.node].name
        with self._meter.watch():
            return Tally(self._work.device, f"cell {visit.node + 1} ({name}), epoch {visit.epoch + 1},", before)

    # -- beginning, checkpoints, end -------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._resident:
            self._latents.begin(self._files)
            return
        with self._meter.watch():
            self._latents.begin(DeviceLatents.copied(self._files, self._work.device, self._meter.host))
            labels = DeviceLatents.copied(
                FileLatents.of_files({"y": self._labels}, self._meter.host),
                self._work.device,
                self._meter.host,
            )
            self._label_source = labels.source()

    def _replay(self, visit: Visit) -> bool:
        """Emit again the latents that a finished cell left behind before the checkpoint; whether it finished."""
        whole = True
        if visit.emit == "finished":
            cell = self._cells.visit(visit.node, changes=False)
            whole = self._emit(cell, self._reader(visit.node), self._latents.make(visit))
        elif visit.lasting:
            whole = self._emit_range(visit, None)
        self._latents.free(tuple(index for index in visit.frees if index in self._latents))
        return whole

    def _checkpoint_due(self, number: int) -> bool:
        """Whether to save before a visit: soon if the run was resumed within one, as it then holds latents twice."""
        return self._checkpoint_soon or self.checkpoints.due(self._share(number, 0.0))

    def _checkpoint_due_within(self, number: int, visit: Visit, step: int) -> bool:
        """Whether to save within a visit; latents that must then be kept need room on the disk."""
        share = self._share(number, (step - visit.first) / (visit.last - visit.first))
        if not self.checkpoints.due(share):
            return False
        return not self._work.emits_in_training or self._latents.has_room(self._plan.spare_disk)

    def _save(self, position: Position) -> None:
        """Make the run durable as it stands; between frontiers, latents that cannot be emitted again too."""
        at_frontier = position == Position.before(position.done, self._visits) and (
            position.done == 0 or self._visits[position.done - 1].frontier
        )
        self.checkpoints.save(position, self._visits, self._work.emits_in_training and not at_frontier)
        self._checkpoint_soon = False

    def _halt(self, position: Position) -> NoReturn:
        """Save a checkpoint, because the run is to stop, and stop."""
        if self._resident and self._work.emits_in_training and not self._latents.has_room(self._plan.spare_disk):
            self._callback.note(
                "not enough disk space to save the latents on the device; the run stops at its newest checkpoint"
            )
        else:
            self._save(position)
        raise self._stopped(self._where(position))

    def _clock(self, node: int) -> None:
        """Count the time up to now as a cell's."""
        now = time.monotonic()
        self.records[node].seconds += now - self._visit_began
        self._visit_began = now

    def _layer_done(self, index: int) -> None:
        """A streamed layer leaves the device; see ``StreamedNet``."""
        self._note_peak(index)
        self._clock(index)

    def _frontier(self, number: int) -> int:
        """Where to take up a run that ends within a visit; latents that cannot be emitted again are saved."""
        return number if self._work.emits_in_training else frontier_before(self._visits, number)

    def _share(self, number: int, of_visit: float) -> float:
        """Of what this process has to do, what is done."""
        return (number - self._resumed.done + of_visit) / max(len(self._visits) - self._resumed.done, 1)

    def _stopped(self, where: str) -> Stopped:
        return Stopped(f"stopped by {self._stop.why} {where}", self._stop.exit_code)

    def _where(self, position: Position) -> str:
        visit = self._visits[position.visit]
        name = self.records[visit.node].name
        return f"at step {position.step} of epoch {visit.epoch + 1} of cell {visit.node + 1} ({name})"

    def _end(self) -> None:
        self._latents.close()
        self._label_source = LabelFile(None)
        self._cells.close()

    # -- watching ----------------------------------------------------------------------------------

    def _note_peak(self, node: int) -> None:
        peak = self._meter.cell_peak
        record = self.records[node]
        record.peak_gpu_mb = max(record.peak_gpu_mb or 0.0, to_mb(peak) or 0.0)
        if self._plan.budget is not None and peak > self._plan.budget:
            raise BudgetError(
                f"cell {node + 1} ({record.name}) took {show_mb(peak)}{self._plan.beside}, over the"
                f" {stated_mb(self._plan.stated_budget or 0)} MiB allowed; its module allocates what the plan"
                " did not predict"
            )

    def _read(self, tally: Tally, visit: Visit) -> Sums:
        with self._meter.watch(("read", visit.node)):
            return tally.read()

    def _show(self, number: int, visit: Visit, step: int, tally: Tally) -> None:
        now = time.monotonic()
        if now - self._last_shown >= _SHOW_EVERY_S:
            self._last_shown = now
            self._callback.stepped(self._progress(number, visit, step, self._read(tally, visit)))

    def _progress(self, number: int, visit: Visit, step: int, sums: Sums) -> Progress:
        elapsed = time.monotonic() - self._started
        share = self._share(number, (step - visit.first) / (visit.last - visit.first))
        record = self.records[visit.node]
        is_classifier = visit.node == self._work.depth
        loss, accuracy = sums.means
        return Progress(
            visit=number,
            visits=len(self._visits),
            name=record.name,
            node=visit.node,
            nodes=len(self.records),
            epoch=visit.epoch,
            epochs=self._work.classifier_epochs if is_classifier else self._work.epochs,
            step=step,
            steps=visit.last,
            loss=loss,
            accuracy=accuracy,
            peak=self._meter.cell_peak,
            budget=self._plan.budget,
            elapsed_s=elapsed,
            left_s=elapsed * (1 - share) / share if share > 0.01 else None,
        )
