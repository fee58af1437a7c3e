"""Commits: when they are due, what they hold, and how a run is taken up from the newest one.

A commit is a position in the schedule and all that training needs to go on from there, bit for bit:
cells with their optimizers, the classifier, how far the visit under way had come, and the latents that
nobody can emit again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from edgetrain.errors import CorruptError, DivergedError, InputError
from edgetrain.objectives.base import Node
from edgetrain.planning.schedule import Visit
from edgetrain.record import CellRecord
from edgetrain.store.journal import Entry
from edgetrain.store.run import RunFolder
from edgetrain.store.tensors import FileEntry, Spilled
from edgetrain.stream.cells import CellStream
from edgetrain.stream.outputs import Sums
from edgetrain.stream.state import CellState, Tensors
from edgetrain.training.caches import Caches, streams_of
from edgetrain.training.conditions import Conditions

CLASSIFIER = "classifier"
INPUTS = "inputs"
ROWS = {"data": ("training rows", "begun"), "test": ("test rows", "trained")}  # whose digests commits keep
_EVERY_S = 60.0
_IN_NEED_S = 10.0  # while the system's memory runs out
_SHARE = 0.05  # of the run's expected time, where that is longer
_COST = 0.03  # of the time that commits may take
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Position:
    """Where a run stands in its schedule.

    Attributes:
        done: visits that are behind it. What they emitted is emitted again, unless it is committed.
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
    def of(cls, entry: Entry, visits: Sequence[Visit]) -> Position:
        """As a journal's entry says.

        Raises:
            CorruptError: the schedule has no such position.
        """
        done, within = entry.get("visits"), entry.get("within")
        try:
            if type(done) is not int or not 0 <= done <= len(visits):
                raise ValueError(f"{done!r} of {len(visits)} visits done")
            if within is None:
                return cls.before(done, visits)
            found = cls(done, within["visit"], within["step"], Sums(**within["sums"]))
            sums = found.sums
            if {type(found.visit), type(found.step), type(sums.samples), type(sums.correct), type(sums.scored)} != {
                int
            }:
                raise TypeError("its position is no whole number")
            if type(sums.loss) is not float:
                raise TypeError("its loss is no number")
            visit = visits[found.visit]
            if not (found.visit >= done and visit.first <= found.step <= visit.last):
                raise ValueError(f"step {found.step} of visit {found.visit}")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise CorruptError(f"the journal's newest commit fits no run like this ({error})") from error
        return found


class Commits:
    """Makes a run durable.

    Args:
        folder: where commits go.
        nodes: the cells.
        cells: between their visits.
        caches: the latents.
        records: what cells measured, kept with every commit.
        inputs: how inputs were scaled, committed once.
        digests: of the prepared rows, by the names in ``ROWS``, to know them again; ``None``: there are none.
        conditions: looked at now and then.
        every: seconds between commits, or ``None``: a minute or 5% of the run, but no more than 3% of the time.
        began: when this process began with the run, by the monotonic clock.
        energy: joules that the device took since then, or ``None`` where that is unknown.
    """

    def __init__(
        self,
        folder: RunFolder,
        nodes: Sequence[Node],
        cells: CellStream,
        caches: Caches,
        records: list[CellRecord],
        inputs: Tensors,
        digests: Mapping[str, str | None],
        conditions: Conditions,
        every: float | None,
        began: float,
        energy: Callable[[], float | None],
    ):
        self._folder, self._nodes, self._cells, self._caches = folder, nodes, cells, caches
        self._records, self._inputs, self._digests = records, inputs, digests
        self._conditions, self._every, self._began = conditions, every, began
        self._energy, self._energy_before = energy, 0.0
        self._number = 0
        self._seconds_before = self._written_before = self._committing_before = 0.0
        self._cost_s = self._spent_s = 0.0
        self._short_of_memory = False
        self._started = self._last = self._looked = time.monotonic()

    def restore(self, visits: Sequence[Visit]) -> Position:
        """Take up the newest commit.

        Raises:
            CorruptError: it is damaged.
        """
        last = self._folder.last()
        if last is None:
            return Position.before(0, visits)
        position = Position.of(last, visits)
        try:
            self._number = self._folder.commits()
            self._seconds_before = float(last.get("seconds", 0.0))
            self._written_before = float(last.get("written", 0))
            self._committing_before = float(last.get("commit_seconds", 0.0))
            self._energy_before = float("nan") if last.get("energy") is None else float(last["energy"])
            for record, values in zip(self._records, last["cells"], strict=True):
                record.restore(values)
            self._adopt(visits, position.visit)
        except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
            raise CorruptError(f"{self._folder.journal.path}: its newest commit is no run's ({error})") from error
        return position

    def restore_latents(self, device: torch.device) -> bool:
        """Take up the latents of the newest commit; whether it has any."""
        latents = (self._folder.last() or {}).get("latents", {})
        self._caches.reopen(latents, device)
        return bool(latents)

    def due(self, share: float) -> bool:
        """Whether it is time; ``share`` of what this process has to do is done."""
        now = time.monotonic()
        since = now - self._last
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            self._short_of_memory = self._conditions.look()
        if self._short_of_memory and since >= _IN_NEED_S:
            return True
        if self._every is not None:
            return since >= self._every
        expected = (now - self._started) / max(share, 1e-9)
        return since >= max(_EVERY_S, _SHARE * expected, self._cost_s / _COST)

    def commit(self, position: Position, visits: Sequence[Visit], latents: bool) -> None:
        """Make everything durable.

        Args:
            position: where the run stands.
            visits: of the schedule.
            latents: whether latents are part of it.

        Raises:
            DivergedError: a weight is not finite.
            StorageError: the disk refused; the commit before holds.
        """
        began = time.monotonic()
        number = self._number + 1
        entry: Entry = {"visits": position.done, **self.totals(), **self._digests}
        if position != Position.before(position.done, visits):
            sums = asdict(position.sums)
            entry["within"] = {"visit": position.visit, "step": position.step, "sums": sums}
        if latents:
            entry["latents"] = self._caches.commit(number)
        entry["cells"] = [vars(record) for record in self._records]
        self._folder.commit(number, self._changed_units(), entry)
        self._number = number
        self._caches.settle()
        self._adopt(visits, position.visit)
        self._last = time.monotonic()
        self._cost_s = self._last - began
        self._spent_s += self._cost_s

    def totals(self) -> dict[str, Any]:
        """Seconds, those of commits among them, bytes written and joules, by this process and those before."""
        taken = self._energy()
        energy = float("nan") if taken is None else self._energy_before + taken
        return {
            "energy": None if math.isnan(energy) else round(energy, 3),
            "commit_seconds": round(self._committing_before + self._spent_s, 3),
            "seconds": round(self._seconds_before + time.monotonic() - self._began, 3),
            "written": self._written_before + self._folder.written,
        }

    def _adopt(self, visits: Sequence[Visit], done: int) -> None:
        """Let cells be found in the newest commit's files."""
        finished = {visit.node for visit in visits[:done] if visit.final}
        for unit, kinds in self._folder.files().items():
            if unit != INPUTS:
                index = self._index_of(unit)
                self._cells.committed(index, partial(self._read, kinds), needed=index not in finished)

    def _read(self, kinds: Mapping[str, FileEntry]) -> CellState:
        return CellState.of_tensors(self._folder.read_unit(kinds))

    def _index_of(self, unit: str) -> int:
        """The node whose files a unit holds.

        Raises:
            ValueError: there is no such node.
        """
        if unit == CLASSIFIER:
            return len(self._nodes)
        if not unit.isdigit() or int(unit) >= len(self._nodes):
            raise ValueError(f"cell {unit!r} of {len(self._nodes)}")
        return int(unit)

    def _changed_units(self) -> Iterator[tuple[str, Tensors | Spilled]]:
        """What to commit, fetched one by one, so that a commit holds one cell at a time in memory."""
        if self._number == 0 and self._inputs:
            yield INPUTS, self._inputs
        for index in self._cells.dirty():
            content = self._cells.content(index)
            state = self._folder.unspill(content) if isinstance(content, Spilled) else content.to_tensors()
            if index == len(self._nodes):
                owner, unit, buffers = "the classifier", CLASSIFIER, set()
            else:
                owner, unit = f"cell {index + 1} ({self._records[index].name})", f"{index:03}"
                buffers = {f"cell.{name}" for name, _ in self._nodes[index].recipe.skeleton().named_buffers()}
            _check_finite(owner, state, buffers)
            yield unit, content if isinstance(content, Spilled) else state


def _check_finite(owner: str, state: Tensors, buffers: set[str]) -> None:
    """Refuse what is not finite: a commit of it would be of no use. Buffers may hold infinities on purpose.

    Raises:
        DivergedError: a number is not finite.
    """
    for name, value in state.items():
        if value.is_floating_point():
            bad = value.isnan().any() if name in buffers else ~value.isfinite().all()
            if bool(bad):
                raise DivergedError(f"{owner}: {name} is not finite; try a smaller --lr")


def check_rows(folder: RunFolder, name: str, digests: Mapping[str, str | None]) -> None:
    """Refuse other rows than the run's.

    Args:
        folder: of the run.
        name: of the data set that is given.
        digests: of its prepared rows, as ``Commits`` keeps them.

    Raises:
        InputError: they differ.
    """
    kept = folder.last() or {}
    for key, found in digests.items():
        if kept.get(key, found) != found:
            rows, done = ROWS[key]
            raise InputError(
                f"data {name!r}: its {rows} are not those that {folder.path} was {done} with; give the same again, or"
                " start another run"
            )


def working_files(entry: Entry | None) -> set[str]:
    """Names of the files of latents that a commit needs.

    Raises:
        CorruptError: its entry does not name them.
    """
    try:
        latents = ((entry or {}).get("latents") or {}).values()
        streams = [stream for values in latents for stream in streams_of(values)]
    except (TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"the journal's newest commit names no latents ({error})") from error
    return {stream.file for stream in streams} | {stream.sums.name for stream in streams}
