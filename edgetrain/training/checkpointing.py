"""Checkpoints: when they are due, what they hold, and how a run continues from the newest one.

A checkpoint is a position in the schedule and all that training needs to continue from there, bit for bit:
cells with their optimizers, the classifier, how far the visit under way had come, and the latents that
cannot be emitted again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from msgspec import structs

from edgetrain.errors import CorruptError, DivergedError, InputError
from edgetrain.objectives.base import Node
from edgetrain.planning.schedule import Visit
from edgetrain.record import CellRecord, Sums
from edgetrain.store.entries import Checkpoint, FileEntry, Totals, Within
from edgetrain.store.run import RunFolder
from edgetrain.store.tensors import Spilled
from edgetrain.store.units import Kinds
from edgetrain.stream.cells import CellStream
from edgetrain.stream.state import CellState, Tensors
from edgetrain.training.latent_cache import LatentCache
from edgetrain.training.system_monitor import SystemMonitor

CLASSIFIER = "classifier"
INPUTS = "inputs"
_EVERY_S = 60.0
_IN_NEED_S = 10.0  # while the system's memory runs out
_SHARE = 0.05  # of the run's expected time, where that is longer
_COST = 0.03  # of the time that checkpoints may take
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Position:
    """Where a run stands in its schedule.

    Attributes:
        done: visits that are behind it. What they emitted is emitted again, unless it is in the checkpoint.
        visit: the visit under way; those from ``done`` to it train nothing.
        step: its first step that is not done.
        sums: what its steps have come to.
    """

    done: int
    visit: int
    step: int
    sums: Sums = Sums()

    @classmethod
    def before(cls, number: int, visits: Sequence[Visit]) -> Position:
        """Before a visit, or at the end of all."""
        return cls(number, number, visits[number].first if number < len(visits) else 0)

    @classmethod
    def of(cls, saved: Checkpoint, visits: Sequence[Visit]) -> Position:
        """The position of a checkpoint.

        Raises:
            CorruptError: the schedule has no such position.
        """
        done, within = saved.visits, saved.within
        if done > len(visits):
            raise CorruptError(f"the newest checkpoint does not fit this run: {done} of {len(visits)} visits are done")
        if within is None:
            return cls.before(done, visits)
        if not done <= within.visit < len(visits) or not _holds(visits[within.visit], within.step):
            raise CorruptError(
                f"the newest checkpoint does not fit this run: it is at step {within.step} of visit {within.visit}"
            )
        return cls(done, within.visit, within.step, within.sums)

    def within(self, visits: Sequence[Visit]) -> Within | None:
        """The position in the visit under way; ``None`` before a visit."""
        return None if self == Position.before(self.done, visits) else Within(self.visit, self.step, self.sums)


def _holds(visit: Visit, step: int) -> bool:
    return visit.first <= step <= visit.last


@dataclass(frozen=True)
class Digests:
    """Of the prepared rows of a data set, by which they are recognised.

    Attributes:
        data: of the training rows.
        test: of the test rows; ``None``: there are none.
    """

    data: str | None
    test: str | None

    def check(self, folder: RunFolder, name: str) -> None:
        """Refuse rows that are not those of the run in a folder.

        Args:
            folder: of the run.
            name: of the data set that these rows are from.

        Raises:
            InputError: they differ.
        """
        saved = folder.last()
        if saved is not None and saved.data != self.data:
            raise _other_rows(folder, name, "training rows", "begun")
        if saved is not None:
            check_test_rows(folder, name, self.test)


def check_test_rows(folder: RunFolder, name: str, digest: str | None) -> None:
    """Refuse test rows that are not the run's; see ``Digests.check``."""
    saved = folder.last()
    if saved is not None and saved.test != digest:
        raise _other_rows(folder, name, "test rows", "trained")


def _other_rows(folder: RunFolder, name: str, rows: str, done: str) -> InputError:
    return InputError(
        f"data {name!r}: its {rows} are not those that {folder.path} was {done} with; give the same again, or"
        " start another run"
    )


class Checkpoints:
    """Makes a run durable.

    Args:
        folder: where checkpoints go.
        nodes: the cells.
        cells: between their visits.
        latents: that exist at the moment.
        records: what cells measured, a part of every checkpoint.
        inputs: how inputs were scaled, saved once.
        digests: of the prepared rows.
        monitor: looked at now and then.
        every: seconds between checkpoints, or ``None``: a minute or 5% of the run, but no more than 3% of the time.
        began: when this process began with the run, by the monotonic clock.
        energy: joules that the device used since then, or ``None`` where that is unknown.
    """

    def __init__(
        self,
        folder: RunFolder,
        nodes: Sequence[Node],
        cells: CellStream,
        latents: LatentCache,
        records: list[CellRecord],
        inputs: Tensors,
        digests: Digests,
        monitor: SystemMonitor,
        every: float | None,
        began: float,
        energy: Callable[[], float | None],
    ):
        self._folder, self._nodes, self._cells, self._latents = folder, nodes, cells, latents
        self._records, self._inputs, self._digests = records, inputs, digests
        self._monitor, self._every, self._began = monitor, every, began
        self._energy = energy
        self._number = 0
        self._before = Totals(energy=0.0)  # of earlier processes
        self._cost_s = self._spent_s = 0.0
        self._short_of_memory = False
        self._started = self._last = self._looked = time.monotonic()

    def restore(self, visits: Sequence[Visit]) -> Position:
        """Continue from the newest checkpoint.

        Raises:
            CorruptError: it is damaged.
        """
        saved = self._folder.last()
        if saved is None:
            return Position.before(0, visits)
        position = Position.of(saved, visits)
        if len(saved.cells) != len(self._records):
            raise CorruptError(
                f"{self._folder.journal.path}: the newest checkpoint is of {len(saved.cells)} cells; this run has"
                f" {len(self._records)}"
            )
        self._number, self._before = saved.number, saved.totals
        for record, known in zip(self._records, saved.cells, strict=True):
            record.restore(known)
        self._adopt(visits, position.visit)
        return position

    def restore_latents(self, device: torch.device) -> bool:
        """Take up the latents of the newest checkpoint; whether it has any."""
        saved = self._folder.last()
        latents = {} if saved is None else saved.latents
        self._latents.reopen(latents, device)
        return bool(latents)

    def due(self, share: float) -> bool:
        """Whether it is time; ``share`` of what this process has to do is done."""
        now = time.monotonic()
        since = now - self._last
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            self._short_of_memory = self._monitor.look()
        if self._short_of_memory and since >= _IN_NEED_S:
            return True
        if self._every is not None:
            return since >= self._every
        expected = (now - self._started) / max(share, 1e-9)
        return since >= max(_EVERY_S, _SHARE * expected, self._cost_s / _COST)

    def save(self, position: Position, visits: Sequence[Visit], latents: bool) -> None:
        """Make everything durable.

        Args:
            position: where the run stands.
            visits: of the schedule.
            latents: whether latents are part of it.

        Raises:
            DivergedError: a weight is not finite.
            StorageError: the disk refused; the checkpoint before holds.
        """
        began = time.monotonic()
        number = self._number + 1
        checkpoint = Checkpoint(
            number=number,
            visits=position.done,
            within=position.within(visits),
            latents=self._latents.save(number) if latents else {},
            cells=self._records,
            totals=self.totals(),
            data=self._digests.data,
            test=self._digests.test,
        )
        self._folder.save(checkpoint, self._changed_units())
        self._number = number
        self._latents.settle()
        self._adopt(visits, position.visit)
        self._last = time.monotonic()
        self._cost_s = self._last - began
        self._spent_s += self._cost_s

    def finish(self) -> None:
        """Give the files of the newest checkpoint their final names, unless they have them."""
        saved = self._folder.last()
        assert saved is not None
        if not saved.finished:
            self._folder.finish(structs.replace(saved, number=saved.number + 1, within=None, latents={}))

    def totals(self) -> Totals:
        """What this process and those before it have used."""
        taken, before = self._energy(), self._before
        energy = None if taken is None or before.energy is None else round(before.energy + taken, 3)
        return Totals(
            seconds=round(before.seconds + time.monotonic() - self._began, 3),
            checkpoint_seconds=round(before.checkpoint_seconds + self._spent_s, 3),
            written=before.written + self._folder.usage.written,
            energy=None if energy is None or math.isnan(energy) else energy,
        )

    def _adopt(self, visits: Sequence[Visit], done: int) -> None:
        """Let cells be found in the newest checkpoint's files."""
        finished = {visit.node for visit in visits[:done] if visit.final}
        for unit, files in self._folder.files().items():
            if unit != INPUTS:
                index = self._index_of(unit)
                self._cells.saved(index, partial(self._read, files), needed=index not in finished)

    def _read(self, files: Mapping[str, FileEntry], optimizer: bool) -> CellState:
        return CellState.of_kinds(self._folder.units.read(files, optimizer))

    def _index_of(self, unit: str) -> int:
        """The node whose files a unit holds.

        Raises:
            CorruptError: the run has no such node.
        """
        if unit == CLASSIFIER:
            return len(self._nodes)
        if not unit.isdigit() or int(unit) >= len(self._nodes):
            raise CorruptError(f"{self._folder.journal.path}: holds cell {unit!r}; this run has {len(self._nodes)}")
        return int(unit)

    def _changed_units(self) -> Iterator[tuple[str, Kinds | Spilled]]:
        """What to save, fetched one by one, so that a checkpoint holds one cell at a time in memory."""
        if self._number == 0 and self._inputs:
            yield INPUTS, {"weights": self._inputs}
        for index in self._cells.dirty():
            content = self._cells.content(index)
            kinds = self._folder.units.unspill(content) if isinstance(content, Spilled) else content.to_kinds()
            if index == len(self._nodes):
                owner, unit, buffers = "the classifier", CLASSIFIER, set()
            else:
                owner, unit = f"cell {index + 1} ({self._records[index].name})", f"{index:03}"
                buffers = {f"cell.{name}" for name, _ in self._nodes[index].recipe.skeleton().named_buffers()}
            for tensors in kinds.values():
                _check_finite(owner, tensors, buffers)
            yield unit, content if isinstance(content, Spilled) else kinds


def _check_finite(owner: str, state: Mapping[str, torch.Tensor], buffers: set[str]) -> None:
    """Refuse what is not finite: a checkpoint of it would be of no use. Buffers may hold infinities on purpose.

    Raises:
        DivergedError: a number is not finite.
    """
    for name, value in state.items():
        if value.is_floating_point():
            bad = value.isnan().any() if name in buffers else ~value.isfinite().all()
            if bool(bad):
                raise DivergedError(f"{owner}: {name} is not finite; try a smaller --lr")


def working_files(saved: Checkpoint | None) -> set[str]:
    """Names of the files of latents that a checkpoint needs."""
    latents = {} if saved is None else saved.latents
    streams = [stream for each in latents.values() for stream in each.streams]
    return {stream.file for stream in streams} | {stream.sums.name for stream in streams}
