"""Carries visits out: fetches the cell, feeds it, trains it, keeps what it emits, commits.

Read `_visit` first: it is the whole of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from edgetrain.errors import BudgetError
from edgetrain.keys import epoch_order
from edgetrain.memory.meter import Meter
from edgetrain.planning.plan import Plan
from edgetrain.planning.schedule import SCHEDULES, Visit
from edgetrain.planning.workload import Workload
from edgetrain.record import CellRecord
from edgetrain.store.latents import LatentFile
from edgetrain.store.run import RunFolder, Spilled
from edgetrain.stream.cell import LiveCell, State
from edgetrain.stream.cells import CellStream
from edgetrain.stream.executor import Executor, Tally
from edgetrain.stream.feed import DeviceFeed, Feed, FileFeed, Slice
from edgetrain.stream.latents import DeviceLatents, FileLatents, Latents
from edgetrain.stream.readout import DeviceCellsFeed, FileCellsFeed, Reading, Readout, train_readout
from edgetrain.stream.tiles import TiledCell, at_hand, phases_of
from edgetrain.training.caches import Caches
from edgetrain.training.conditions import Conditions
from edgetrain.training.watcher import Progress, Watcher
from edgetrain.units import MIB, show_mb, to_mb

_SHOW_EVERY_S = 0.25
_COMMIT_EVERY_S = 60.0
_COMMIT_IN_NEED_S = 10.0  # while the system's memory runs out
_COMMIT_SHARE = 0.05  # of the run's expected time, where that is longer
READOUT = "readout"
INPUTS = "inputs"


@dataclass(frozen=True)
class Choices:
    """What a trainer is free to choose without changing a bit of the result.

    Attributes:
        host_tier: bytes of host memory for cells between visits.
        prefetch: batches gathered ahead.
        keep_latents: leave latents that nobody needs any more.
        checkpoint_every: seconds between commits, or ``None``.
    """

    host_tier: int
    prefetch: int
    keep_latents: bool
    checkpoint_every: float | None


class Trainer:
    """One run's training, from its newest commit to its end.

    Args:
        work: the run.
        plan: micro-batches and placement.
        folder: where commits and latents go.
        inputs: latents 0.
        labels: of the training rows.
        input_state: how inputs were scaled, committed with the cells.
        meter: watches the device side.
        watcher: is told of progress.
        choices: see ``Choices``.
    """

    def __init__(
        self,
        work: Workload,
        plan: Plan,
        folder: RunFolder,
        inputs: FileLatents,
        labels: LatentFile,
        input_state: State,
        meter: Meter,
        watcher: Watcher,
        choices: Choices,
    ):
        self._work, self._plan, self._folder, self._meter = work, plan, folder, meter
        self._labels, self._input_state, self._watcher, self._choices = labels, input_state, watcher, choices
        self._conditions = Conditions(work.device, plan.budget, watcher.note)
        self._resident = plan.placement == "resident"
        self._executor = Executor(work.objective, work.device, meter, work.seed, work.augmentation)
        self._cells = CellStream(self._place, work.device, meter, folder, choices.host_tier, self._resident)
        self._readout: Readout | None = None
        self._readout_state: State | None = None
        self._files: FileLatents = inputs
        self._caches = Caches(
            work, plan.cut, folder, self._resident, meter.host, choices.prefetch > 0, choices.keep_latents
        )
        self._device_labels: torch.Tensor | None = None
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
        self._started = self._last_commit = self._last_shown = time.monotonic()
        self._commits = 0

    @property
    def latents_peak(self) -> int:
        """The most bytes of latents in files at once."""
        return self._caches.peak

    def run(self) -> None:
        """Train from the newest commit to the end, and commit that.

        Raises:
            DivergedError: a loss is not finite.
            StorageError: the disk refused; the newest commit holds.
        """
        try:
            self._carry_out(list(self._schedule()))
        finally:
            self._end()

    def _carry_out(self, visits: list[Visit]) -> None:
        done = self._restore(visits)
        if done:
            self._watcher.note(f"going on after visit {done} of {len(visits)}; finished cells emit their latents again")
        self._begin()
        for number, (visit, following) in enumerate(pairwise([*visits, None])):
            assert visit is not None
            if number < done:
                self._replay(visit)
                continue
            self._visit(number, len(visits), visit, None if following is None else following.node)
            if following is not None and visit.frontier and self._commit_due(number + 1, len(visits), done):
                self._commit(number + 1, visits)
        self._cells.leave()
        if done < len(visits):
            self._commit(len(visits), visits)

    def _schedule(self) -> Iterator[Visit]:
        work = self._work
        return SCHEDULES[work.schedule](
            work.depth, work.epochs, work.steps, work.readout_epochs, work.classifier_reads, self._plan.cut
        )

    # -- one visit ---------------------------------------------------------------------------------

    def _visit(self, number: int, visits: int, visit: Visit, following: int | None) -> None:
        start = time.monotonic()
        record = self.records[visit.node]
        if not visit.trains:
            self._emit_range(visit, following)
            self._caches.free(visit.frees)
            record.seconds += time.monotonic() - start
            return
        if visit.node == self._work.depth:
            tally, waited = self._visit_readout(number, visits, visit)
        else:
            tally, waited = self._visit_cell(number, visits, visit, following)
        self._caches.free(visit.frees)
        loss, accuracy = self._read(tally, visit)
        record.epochs = visit.epoch + 1
        record.train_loss, record.train_accuracy = self._epoch_so_far(visit, loss, accuracy)
        seconds = time.monotonic() - start
        record.seconds += seconds
        record.waited_seconds += waited
        self._conditions.visited(visit.node, visit.last - visit.first, seconds)
        self._watcher.visited(self._progress(number, visits, visit, visit.last, loss, accuracy))

    def _epoch_so_far(self, visit: Visit, loss: float, accuracy: float | None) -> tuple[float, float | None]:
        """Loss and accuracy with the ranges of the epoch that came before."""
        record, size = self.records[visit.node], self._work.batch_size
        before = visit.first * size / min(visit.last * size, self._work.rows)
        if before == 0 or record.train_loss is None:
            return loss, accuracy
        known = None not in (accuracy, record.train_accuracy)
        mixed = before * (record.train_accuracy or 0.0) + (1 - before) * (accuracy or 0.0)
        return before * record.train_loss + (1 - before) * loss, mixed if known else None

    def _visit_cell(self, number: int, visits: int, visit: Visit, following: int | None) -> tuple[Tally, float]:
        cell = self._cells.visit(visit.node)
        if following is not None and following != visit.node:
            self._cells.expect(following)
        feed = self._feed(visit.node)
        tally = self._tally(visit)
        out = None if visit.emit == "none" else self._caches.make(visit)
        training_sink = out.sink() if out is not None and visit.emit == "training" else None
        try:
            self._executor.train(
                cell,
                feed,
                self._slice(visit, phases_of(self._work.objective, cell.tiles)),
                visit.epoch,
                tally,
                training_sink,
                lambda step: self._show(number, visits, visit, step, tally),
            )
        finally:
            if training_sink is not None:
                training_sink.close()
        if out is not None and visit.emit == "finished":
            self._emit(cell, feed, out)
        self._note_peak(visit.node)
        return tally, feed.waited_s

    def _emit_range(self, visit: Visit, following: int | None) -> None:
        """Let a finished cell emit a range of its latents again."""
        work, node = self._work, visit.node
        cell = self._cells.visit(node, changes=False)
        if following is not None and following not in (node, work.depth):
            self._cells.expect(following)
        order = epoch_order(work.seed, visit.epoch, work.rows) if visit.emit == "again" else None
        micro = self._plan.micro_batches[node]
        piece = Slice(work.rows, work.batch_size, micro, visit.first, visit.last, order, phases=cell.tiles)
        feed, sink = self._feed(node), self._caches.make(visit).sink()
        try:
            self._executor.emit(cell, feed, piece, sink)
        finally:
            sink.close()
        self._note_peak(node)

    def _emit(self, cell: LiveCell | TiledCell, feed: Feed, out: Latents) -> None:
        """Latents of the finished cell, in sample order, view by view."""
        sink = out.sink()
        try:
            for view in range(self._work.views):
                self._executor.emit(cell, feed, self._in_sample_order(cell, view), sink, view)
        finally:
            sink.close()

    def _visit_readout(self, number: int, visits: int, visit: Visit) -> tuple[Tally, float]:
        self._cells.leave()
        self._meter.start_cell(self._work.depth)
        readout = self._open_readout()
        tally = self._tally(visit)
        feed = self._cells_feed()
        train_readout(
            readout,
            feed,
            self._slice(visit, 1),
            len(self._work.classifier_reads),
            self._work.classes,
            self._meter,
            tally,
            lambda step: self._show(number, visits, visit, step, tally),
        )
        self._note_peak(visit.node)
        if self._work.emits_in_training and not self._resident:  # cells come next, and need the room
            self._readout_state, self._readout = readout.state(), None
        return tally, feed.waited_s

    def _open_readout(self) -> Readout:
        if self._readout is None:
            assert self._work.readout is not None
            with self._meter.watch():
                self._readout = Readout(
                    self._work.feature_widths,
                    self._work.classes,
                    self._work.readout,
                    self._work.device,
                    self._work.seed,
                    self._meter,
                    self._plan.readout_resident,
                    self._readout_state,
                )
        return self._readout

    # -- what a visit needs ------------------------------------------------------------------------

    def _place(self, index: int, state: Mapping[str, torch.Tensor] | None) -> LiveCell | TiledCell:
        work = self._work
        tiles = self._plan.tiles[index]
        return at_hand(work.nodes[index], work.objective, work.optimizer, work.device, tiles, state, self._meter.host)

    def _slice(self, visit: Visit, phases: int) -> Slice:
        work = self._work
        order = epoch_order(work.seed, visit.epoch, work.rows)
        micro = self._plan.micro_batches[visit.node]
        view = visit.epoch % work.views if visit.node else 0  # the inputs lie there once
        return Slice(work.rows, work.batch_size, micro, visit.first, visit.last, order, phases, view)

    def _in_sample_order(self, cell: LiveCell | TiledCell, view: int) -> Slice:
        work, index = self._work, cell.node.index
        micro = self._plan.micro_batches[index]
        return Slice(work.rows, work.batch_size, micro, 0, work.steps, phases=cell.tiles, view=view if index else 0)

    def _feed(self, index: int) -> Feed:
        source = self._caches[index]
        if isinstance(source, DeviceLatents):
            assert self._device_labels is not None
            return DeviceFeed(source, self._device_labels)
        assert isinstance(source, FileLatents)
        return FileFeed(source, self._labels, self._work.device, self._meter.host, self._choices.prefetch)

    def _cells_feed(self) -> FileCellsFeed | DeviceCellsFeed:
        sources = [self._caches[index + 1] for index in self._work.classifier_reads]
        reading = Reading(self._work.objective.classifier_stream, self._work.objective.features)
        on_device = [source for source in sources if isinstance(source, DeviceLatents)]
        if on_device:
            assert self._device_labels is not None
            return DeviceCellsFeed(on_device, self._device_labels, reading)
        in_files = [source for source in sources if isinstance(source, FileLatents)]
        return FileCellsFeed(
            in_files, self._labels, self._work.device, self._meter.host, self._choices.prefetch, reading
        )

    def _tally(self, visit: Visit) -> Tally:
        name = self.records[visit.node].name
        with self._meter.watch():
            return Tally(self._work.device, f"cell {visit.node + 1} ({name}), epoch {visit.epoch + 1},")

    # -- beginning, commits, end -------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._resident:
            self._caches.begin(self._files)
            return
        with self._meter.watch():
            self._caches.begin(DeviceLatents.copied(self._files, self._work.device, self._meter.host))
            labels = DeviceLatents.copied(
                FileLatents.of_files({"y": self._labels}, self._meter.host),
                self._work.device,
                self._meter.host,
            )
            self._device_labels = labels.tensors["y"].view(torch.int64).view(-1)

    def _restore(self, visits: list[Visit]) -> int:
        """Take up the newest commit; returns the number of visits that it holds."""
        last = self._folder.last()
        if last is None:
            return 0
        self._commits = last["commit"]
        for record, values in zip(self.records, last["cells"], strict=True):
            for name in (
                "epochs",
                "train_loss",
                "train_accuracy",
                "seconds",
                "waited_seconds",
                "peak_gpu_mb",
            ):
                setattr(record, name, values[name])
        files = self._folder.files()
        if READOUT in files:
            self._readout_state = self._folder.read_unit(files[READOUT])
        self._adopt(visits, last["visits"])
        return int(last["visits"])

    def _adopt(self, visits: list[Visit], done: int) -> None:
        """Let cells be found in the newest commit's files."""
        finished = {visit.node for visit in visits[:done] if visit.final}
        for unit, kinds in self._folder.files().items():
            if unit not in (READOUT, INPUTS):
                read = partial(self._folder.read_unit, kinds)
                self._cells.committed(int(unit), read, needed=int(unit) not in finished)

    def _replay(self, visit: Visit) -> None:
        """Make again what a committed visit left behind: the latents of a finished cell."""
        if visit.emit == "finished":
            cell = self._cells.visit(visit.node, changes=False)
            self._emit(cell, self._feed(visit.node), self._caches.make(visit))
        elif visit.lasting:
            self._emit_range(visit, None)
        self._caches.free(tuple(index for index in visit.frees if index in self._caches))

    def _commit_due(self, done: int, visits: int, skipped: int) -> bool:
        now = time.monotonic()
        if self._conditions.look() and now - self._last_commit >= _COMMIT_IN_NEED_S:
            return True
        if self._choices.checkpoint_every is not None:
            return now - self._last_commit >= self._choices.checkpoint_every
        expected = (now - self._started) * (visits - skipped) / max(done - skipped, 1)
        return now - self._last_commit >= max(_COMMIT_EVERY_S, _COMMIT_SHARE * expected)

    def _commit(self, done: int, visits: list[Visit]) -> None:
        self._commits += 1
        entry = {"visits": done, "cells": [vars(record) for record in self.records]}
        self._folder.commit(self._commits, self._changed_units(), entry)
        self._adopt(visits, done)
        self._last_commit = time.monotonic()

    def _changed_units(self) -> Iterator[tuple[str, State | Spilled]]:
        """What to commit, fetched one by one, so that a commit holds one cell at a time in memory."""
        if self._commits == 1 and self._input_state:
            yield INPUTS, self._input_state
        for index in self._cells.dirty():
            yield f"{index:03}", self._cells.content(index)
        if self._readout is not None:
            yield READOUT, self._readout.state()
        elif self._readout_state is not None:
            yield READOUT, self._readout_state

    def _end(self) -> None:
        self._readout = None
        self._caches.close()
        self._device_labels = None
        self._cells.close()

    # -- watching ----------------------------------------------------------------------------------

    def _note_peak(self, node: int) -> None:
        peak = self._meter.cell_peak
        record = self.records[node]
        record.peak_gpu_mb = max(record.peak_gpu_mb or 0.0, to_mb(peak) or 0.0)
        if self._plan.budget is not None and peak > self._plan.budget:
            raise BudgetError(
                f"cell {node + 1} ({record.name}) took {show_mb(peak)} of the device, over the"
                f" {self._plan.budget / MIB:g} MiB allowed; its module allocates what the plan did not foresee"
            )

    def _read(self, tally: Tally, visit: Visit) -> tuple[float, float | None]:
        with self._meter.watch(("read", visit.node)):
            return tally.read()

    def _show(self, number: int, visits: int, visit: Visit, step: int, tally: Tally) -> None:
        now = time.monotonic()
        if now - self._last_shown >= _SHOW_EVERY_S:
            self._last_shown = now
            loss, accuracy = self._read(tally, visit)
            self._watcher.stepped(self._progress(number, visits, visit, step + 1, loss, accuracy))

    def _progress(
        self, number: int, visits: int, visit: Visit, step: int, loss: float, accuracy: float | None
    ) -> Progress:
        elapsed = time.monotonic() - self._started
        share = (number + step / max(visit.last, 1)) / visits
        record = self.records[visit.node]
        is_readout = visit.node == self._work.depth
        return Progress(
            visit=number,
            visits=visits,
            name=record.name,
            node=visit.node,
            nodes=len(self.records),
            epoch=visit.epoch,
            epochs=self._work.readout_epochs if is_readout else self._work.epochs,
            step=step,
            steps=visit.last,
            loss=loss,
            accuracy=accuracy,
            peak=self._meter.cell_peak,
            budget=self._plan.budget,
            elapsed_s=elapsed,
            left_s=elapsed * (1 - share) / share if share > 0.01 else None,
        )
