"""Hot-plugging: change one cell of a finished run and leave the earlier ones untouched.

A cell learns from what the cells before it emit, and from nothing behind it. So a run can be continued
again after any finished cell: the cells that stay emit their latents once more, and the new ones are trained
as under the ``separate`` schedule, whatever schedule the run had. What is behind a changed cell has to go
or to be trained again, and so has a classifier on all cells' latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from msgspec import structs

from edgetrain.config import Settings
from edgetrain.data.arrays import ARRAYS
from edgetrain.data.base import DataSet
from edgetrain.errors import BudgetError, CorruptError, DivergedError, InputError, StorageError
from edgetrain.objectives.base import Objective
from edgetrain.planning.plan import Plan
from edgetrain.planning.planner import require_fit
from edgetrain.planning.schedule import Visit, frontier_before
from edgetrain.record import CellRecord, RunRecord
from edgetrain.store import edit
from edgetrain.store.atomic import size_of
from edgetrain.store.edit import open_folder
from edgetrain.store.entries import Checkpoint
from edgetrain.store.run import RunFolder
from edgetrain.training.callbacks import Callback
from edgetrain.training.checkpointing import INPUTS
from edgetrain.training.config_file import settings_of
from edgetrain.training.fit import beginning, check_disk
from edgetrain.training.identity import check_net
from edgetrain.training.inputs import Shape
from edgetrain.training.job import Job, open_job, plan_job
from edgetrain.training.methods import check_method, given_again
from edgetrain.training.process import process_state
from edgetrain.training.run import Run, digests_of, read_record
from edgetrain.training.session import train_and_finish
from edgetrain.units import show_mb

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class CellStatus:
    """A finished run's cell and its file.

    Attributes:
        number: counted from 1.
        record: what the run measured.
        file: where its weights are.
        state: ``ok``, or what is wrong with the file.
    """

    number: int
    record: CellRecord
    file: str
    state: str


def list_cells(run: Run) -> list[CellStatus]:
    """The cells of a finished run, each file read and compared with its checksum."""
    folder, found = open_folder(run.path), []
    files = folder.files()
    for index, record in enumerate(run.record.cells):
        state = "ok" if _unit(index) in files else "not in the journal"
        try:
            folder.units.read(files.get(_unit(index), {}))
        except (CorruptError, StorageError) as error:
            state = str(error)
        found.append(CellStatus(index + 1, record, f"cells/{_unit(index)}.safetensors", state))
    return found


def append(
    path: Path,
    net: Any = None,
    changes: Mapping[str, Any] = _NONE,
    data: DataSet | None = None,
    callback: Callback | None = None,
    method: Any = None,
) -> Run:
    """Train more cells behind those of a finished run.

    Args:
        path: the run folder.
        net: a longer net that begins with the run's cells: a spec, or modules; ``None``: the run's own net, of
            which cells were dropped before.
        changes: settings for the new cells, such as ``epochs`` and ``lr``.
        data: the run's data set, if it was given in memory.
        callback: receives progress and notes.
        method: the run's method again, if it is your own class: the class or ``file.py:Class``.

    Raises:
        InputError: the net does not begin with the run's cells, or has no more than these.
    """
    before = _Finished.of(path, method)
    stated = {} if net is None else {"net": net if isinstance(net, str) else "modules"}
    settings = replace(before.settings, cells=None).with_values({**stated, **changes})
    return _Edit(before, settings, before.depth, before.depth + 1, "append").apply(net, data, callback)


def drop(
    path: Path,
    number: int | None = None,
    net: Any = None,
    data: DataSet | None = None,
    callback: Callback | None = None,
    method: Any = None,
) -> Run:
    """Remove cell ``number`` (from 1; by default the last) and those behind it.

    ``net`` is for runs of your own modules: the same ones again.

    Raises:
        InputError: the run has no such cell, or it is the first.
    """
    before = _Finished.of(path, method)
    kept = before.checked(before.depth if number is None else number) - 1
    if kept == 0:
        raise InputError(f"{path}: cell 1 is the first, and a run needs at least one cell; remove the folder instead")
    return _Edit(before, replace(before.settings, cells=kept), kept, kept, "drop").apply(net, data, callback)


def retrain(
    path: Path,
    number: int,
    net: Any = None,
    changes: Mapping[str, Any] = _NONE,
    data: DataSet | None = None,
    callback: Callback | None = None,
    method: Any = None,
) -> Run:
    """Train cell ``number`` (from 1) anew, and those behind it, which learn from what it emits.

    Raises:
        InputError: the run has no such cell.
    """
    before = _Finished.of(path, method)
    kept = before.checked(number) - 1
    settings = before.settings.with_values(changes)
    return _Edit(before, settings, kept, before.depth, f"retrain {number}").apply(net, data, callback)


@dataclass(frozen=True)
class _Finished:
    """A finished run as it is; ``own``: its net is the user's own code; ``method``: its method, if that is."""

    path: Path
    settings: Settings
    record: RunRecord
    shape: Shape
    own: bool
    method: type[Objective] | None

    @classmethod
    def of(cls, path: Path, method: Any) -> _Finished:
        """The run in a folder.

        Raises:
            InputError: there is none, it is unfinished, or it has no cells to change.
        """
        record, shape = read_record(path)
        settings = settings_of(path)
        if settings.schedule is None:
            raise InputError(f"{path}: {settings.method} trains the whole net at once; it has no cells to change")
        own = settings.net == "modules" or ".py:" in (settings.net or "")
        kind = given_again(path, settings, method)
        if kind is not None:
            check_method(RunFolder(path), kind)
        return cls(path, settings, record, shape, own, kind)

    @property
    def depth(self) -> int:
        """Number of its cells."""
        return len(self.record.cells)

    def checked(self, number: int) -> int:
        """``number`` if it is one of a cell."""
        if not 1 <= number <= self.depth:
            raise InputError(f"{self.path}: has no cell {number}; its cells are 1 to {self.depth}")
        return number


@dataclass(frozen=True)
class _Edit:
    """A finished run that is continued.

    Attributes:
        before: the run as it stands.
        settings: with what is changed.
        kept: cells that stay as they are.
        least: cells that the changed net must have.
        word: what is done, for the record.
    """

    before: _Finished
    settings: Settings
    kept: int
    least: int
    word: str

    def apply(self, net: Any, data: DataSet | None, callback: Callback | None) -> Run:
        """Check everything, then take the run up again and finish it."""
        path = self.before.path
        if net is None and self.before.own:
            raise InputError(f"{path}: this run's net is your own code; name it again (--net path/to/net.py:function)")
        if data is None and self.before.settings.data == ARRAYS:
            raise InputError(f"{path}: was trained on arrays in memory; give them again, in Python")
        folder, looking = open_folder(path), callback or Callback()
        with process_state(self.settings):
            asked = self._within_disk(replace(self.settings, schedule="separate"), path)
            job = _listed(open_job(asked, net, data, self.before.method))
            self._check(job, folder)
            plan = plan_job(job)
            require_fit(plan)
            check_disk(path, plan, replaces=False)
            job = replace(job, settings=replace(job.settings, max_disk_gb=self.settings.max_disk_gb))
            with folder.locked():
                if read_record(path)[0] != self.before.record:
                    raise InputError(f"{path}: was changed by another process meanwhile; check it and try again")
                self._carry_out(job, plan, folder, looking)
                return Run.of_job(path, job)

    def _carry_out(self, job: Job, plan: Plan, folder: RunFolder, callback: Callback) -> None:
        """Train the edited run beside the finished one, which it then replaces."""
        units = [INPUTS, *map(_unit, range(self.kept))]
        kept = {unit: files for unit, files in folder.files().items() if unit in units}
        try:
            words = f"{self.word}: kept {self.kept} cells of {self.before.depth}, net {job.net.spec}"
            edited = edit.start(folder, beginning(job, plan, kept), words, self._checkpoint(job, plan, folder))
            train_and_finish(job, plan, edited, callback)
        except BaseException as error:
            if isinstance(error, (CorruptError, DivergedError, InputError)):  # these would come again
                edit.discard(folder)
                callback.note(f"{folder.path} is as it was before")
            else:
                callback.note(f"{folder.path} is as it was before; repeat the command to continue")
            raise
        edit.adopt(folder)

    def _within_disk(self, settings: Settings, path: Path) -> Settings:
        """Settings with the disk that is left beside the finished run, whose files stay until the edit is done."""
        if settings.max_disk_gb is None:
            return settings
        left = settings.max_disk_gb - size_of(path) / (1 << 30)
        if left <= 0:
            raise BudgetError(
                f"--max-disk-gb {settings.max_disk_gb:.3g}: the finished run in {path} takes {show_mb(size_of(path))}"
                " and stays until the edit is done; use a larger one"
            )
        return replace(settings, max_disk_gb=left)

    def _check(self, job: Job, folder: RunFolder) -> None:
        """Refuse data or a net that are not the run's, and cells to keep that are damaged."""
        before, depth = self.before, job.work.depth
        if before.shape.name != job.data.name:
            raise InputError(
                f"{before.path}: was trained on {before.shape.name!r}, not on {job.data.name!r}; give the same again"
            )
        before.shape.check(job.data)
        digests_of(folder, job.data).check(folder, job.data.name)
        if depth < self.least:
            raise InputError(f"net {job.net.spec!r} has {depth} cells; expected at least {self.least}")
        check_net(folder, job.work.nodes, training=True, kept=self.kept)
        for index in range(self.kept):
            folder.units.read(folder.files().get(_unit(index), {}))

    def _checkpoint(self, job: Job, plan: Plan, folder: RunFolder) -> Checkpoint:
        """Where the edit starts from: the kept cells' visits are done."""
        last = folder.last()
        assert last is not None
        to_come = job.work.depth - self.kept + (job.work.classifier is not None)
        return Checkpoint(
            number=last.number + 1,
            visits=self._kept_visits(job.work.visits(plan.cut)),
            cells=[*self.before.record.cells[: self.kept], *(CellRecord("", 0) for _ in range(to_come))],
            totals=structs.replace(last.totals, energy=None),
            data=last.data,
            test=last.test,
        )

    def _kept_visits(self, visits: Sequence[Visit]) -> int:
        """How many visits are done if the kept cells are: those before the first that trains another."""
        others = (number for number, visit in enumerate(visits) if visit.trains and visit.node >= self.kept)
        return frontier_before(visits, next(others, len(visits)))


def _listed(job: Job) -> Job:
    """The job without sizes that were listed for another number of cells; these are planned."""
    cells, visits = job.work.depth, job.work.depth + (job.work.classifier is not None)
    fitting = {"micro_batch": {visits}, "tiles": {cells, visits}}
    asked = {name: getattr(job.settings, name) for name in fitting}
    others = [name for name, sizes in asked.items() if isinstance(sizes, list) and len(sizes) not in fitting[name]]
    return replace(job, settings=job.settings.with_values(dict.fromkeys(others)))


def _unit(index: int) -> str:
    return f"{index:03}"
