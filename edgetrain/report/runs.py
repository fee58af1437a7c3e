"""What a report shows of a run: all that can be read of its folder, and what cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from edgetrain.config import Settings
from edgetrain.data.arrays import ARRAYS
from edgetrain.errors import CorruptError, EdgetrainError, InputError, StorageError
from edgetrain.record import RunRecord
from edgetrain.store.atomic import storage_errors, verify
from edgetrain.store.entries import Checkpoint
from edgetrain.store.run import MODEL, RECORD, RunFolder
from edgetrain.training.config_file import settings_of
from edgetrain.training.resuming import resuming_command
from edgetrain.training.run import parse_record, read_record
from edgetrain.units import to_mb

T = TypeVar("T")


@dataclass
class ShownRun:
    """A run as far as it can be read.

    Attributes:
        path: its folder.
        record: what it measured; of an unfinished run what its newest checkpoint knows; ``None`` if nothing is known.
        finished: whether the run is finished.
        settings: as it was begun, or ``None``.
        config: the same as text.
        problems: what is missing or damaged, in sentences.
    """

    path: Path
    record: RunRecord | None = None
    finished: bool = False
    settings: Settings | None = None
    config: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its folder."""
        return shown_path(self.path.resolve()).rpartition("/")[2]

    @property
    def can_be_repeated(self) -> bool:
        """Whether the configuration alone gives the same run again: neither data, net nor edits came from elsewhere."""
        asked = self.settings
        if asked is None or asked.data == ARRAYS or asked.net == "modules" or ".py:" in (asked.net or ""):
            return False
        return self.record is not None and not self.record.edits

    def tried(self, read: Callable[[], T], otherwise: T) -> T:
        """What ``read`` returns; if it cannot, that is noted as a problem."""
        try:
            return read()
        except EdgetrainError as error:
            self.tell(str(error))
            return otherwise

    def tell(self, problem: str) -> None:
        """Note a problem, once."""
        readable = _readable(problem)
        if readable not in self.problems:
            self.problems.append(readable)


def open_shown(path: Path) -> ShownRun:
    """All that can be read of a run.

    Raises:
        InputError: the folder is none of a run.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise InputError(f"{path}: not a folder; expected a run folder")
    shown = ShownRun(path)
    if not shown.tried(folder.is_run, True) and not (path / RECORD).is_file():
        raise InputError(f"{path}: holds no run")
    if not shown.tried(lambda: _is_readable(folder), False):
        _open_unverified(shown)
        return shown
    shown.config = shown.tried(folder.config, None) or ""
    shown.settings = shown.tried(lambda: settings_of(path), None)
    shown.finished = bool(shown.tried(folder.results, None))
    if shown.finished:
        shown.record = shown.tried(lambda: read_record(path)[0], None)
        shown.tried(lambda: _verify_model(folder), None)
    for files in (shown.tried(folder.files, None) or {}).values():
        shown.tried(partial(folder.units.read, files), None)
    if shown.record is None:
        shown.record = shown.tried(lambda: _so_far(shown, folder.last()), None)
    return shown


def _is_readable(folder: RunFolder) -> bool:
    """Whether the journal can be read to its end.

    Raises:
        CorruptError: it is damaged, or missing.
    """
    if not folder.is_run():
        raise CorruptError(f"{folder.journal.path}: is missing, or no journal")
    return sum(1 for _ in folder.journal.entries()) > 0


def _open_unverified(shown: ShownRun) -> None:
    """Without its journal a run's files can be read, but nobody knows whether they are as they were written."""
    shown.tell(f"{shown.path}: its files cannot be verified without a journal")
    shown.record = shown.tried(lambda: parse_record(_text(shown.path / RECORD), shown.path)[0], None)
    shown.finished = shown.record is not None
    shown.config = shown.tried(lambda: _text(shown.path / "config.toml"), "")


def _text(path: Path) -> str:
    if not path.is_file():
        raise StorageError(f"{path}: is missing, or no file")
    with storage_errors(path):
        return path.read_text(encoding="utf-8", errors="replace")


def _verify_model(folder: RunFolder) -> None:
    known, path = folder.results().get(MODEL), folder.path / MODEL
    if known is not None:
        verify(path, known.checksum, known.size)


def _so_far(shown: ShownRun, last: Checkpoint | None) -> RunRecord | None:
    """What the newest checkpoint of an unfinished run knows."""
    settings = shown.settings
    if not shown.finished:
        again = resuming_command(shown.path, settings) if settings else "edgetrain fit --resume"
        shown.tell(f"{shown.path}: is not finished; the report shows its newest checkpoint. Resume it with: {again}")
    if last is None or settings is None:
        return None
    cells = list(last.cells)
    classifier = cells.pop() if settings.classifier_epochs and len(cells) > 1 else None
    return RunRecord(
        run=str(shown.path),
        method=settings.method,
        schedule=settings.schedule,
        device="unknown",
        seed=settings.seed,
        epochs=settings.epochs,
        budget_mb=settings.max_gpu_mb,
        peak_gpu_mb=_most([cell.peak_gpu_mb for cell in last.cells]),
        predicted_peak_mb=_most([cell.predicted_peak_mb for cell in last.cells]),
        written_mb=to_mb(last.totals.written),
        energy_j=last.totals.energy,
        seconds=last.totals.seconds,
        waited_seconds=sum(cell.waited_seconds for cell in last.cells),
        checkpoint_seconds=last.totals.checkpoint_seconds,
        placement=settings.placement,
        cells=cells,
        classifier=classifier,
    )


def shown_path(path: Path) -> str:
    """A path as text; bytes that are not UTF-8 are replaced."""
    return _readable(str(path))


def _readable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _most(sizes: list[float | None]) -> float | None:
    return max((size for size in sizes if size is not None), default=None)
