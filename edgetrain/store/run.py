"""A run's folder: who may work in it, what its checkpoints hold, and what it takes on disk.

``config.toml``, ``journal.jsonl``, ``cells/``, ``latents/``, ``record.json``, ``model.safetensors``.
A checkpoint writes cells under its number (``cells/003@7.safetensors``), then its journal line, and only
then removes the files that these replace.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from msgspec import json, structs

from edgetrain.errors import BusyError, CorruptError, InputError, StorageError
from edgetrain.store.atomic import (
    check_name,
    missing_folders,
    size_of,
    storage_errors,
    sync_folder,
    temporary_of,
    verify,
    write_bytes,
    write_text,
)
from edgetrain.store.entries import Begin, Checkpoint, Configure, FileEntry, Files, Results
from edgetrain.store.journal import BEGINNING, Journal
from edgetrain.store.tensors import Spilled, join
from edgetrain.store.units import Kinds, UnitFiles
from edgetrain.store.usage import DiskUsage

RECORD, MODEL = "record.json", "model.safetensors"
REPORT = "report.html"
_LARGEST_RECORD = 1 << 30  # bytes; that of a run of 100,000 cells takes 100 MiB
_RESULTS = (RECORD, MODEL, REPORT)  # of a finished run
_MEMBERS = ("config.toml", "journal.jsonl", "lock", *_RESULTS)
TENSORBOARD = "tensorboard"
EDIT, ADOPTED = "edit", "adopted"  # see ``store.edit``
_FOLDERS = ("cells", "latents", "scratch", "figures", EDIT, ADOPTED, TENSORBOARD)


class RunFolder:
    """A folder that holds one run.

    Attributes:
        path: the folder.
        home: the run's folder, also of an edit within it.
        journal: what became durable.
        units: the files of cells.
        usage: bytes on disk.
    """

    def __init__(self, path: Path):
        self.path = self.home = path
        self.usage = DiskUsage()
        self.journal = Journal(path / "journal.jsonl", self.usage.took)
        self.units = UnitFiles(path, self.usage)
        self._lock = FileLock(path / "lock", timeout=0)  # may be taken again by who holds it

    @property
    def latents(self) -> Path:
        """Where latents are cached."""
        return self.path / "latents"

    def measure(self) -> None:
        """Count bytes anew; latents are counted when they are opened."""
        self.usage.begin(sum(size_of(self.path / name) for name in ("cells", "scratch", *_MEMBERS)))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Work in the folder alone, which is made if it is missing; the lock of a dead process is void.

        Raises:
            BusyError: another process works in it.
            InputError: its name is not valid UTF-8.
            CorruptError: a member is a link, which may lead out of the folder.
            StorageError: the disk refused.
        """
        check_name(self.path)
        self.refuse_links()
        with storage_errors(self.path / "lock"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:  # which is an OSError too
                raise BusyError(f"{self.path}: another edgetrain works in this run folder; wait for it") from None
        try:
            yield
        finally:
            self._lock.release()  # the file stays: removing it could take it from under the next holder

    def refuse_links(self) -> None:
        """Refuse links in the place of the run's files and folders.

        Raises:
            CorruptError: there is one; it may lead out of the folder.
        """
        for name in (*_FOLDERS, *_MEMBERS):
            if (self.path / name).is_symlink():
                raise CorruptError(f"{self.path / name}: is a link; a run folder holds none")

    def create(self, begin: Begin) -> None:
        """Begin a run in the folder: in its journal, and with its ``config.toml``.

        Raises:
            StorageError: the disk refused; nothing is left behind.
        """
        created = missing_folders(self.path)
        try:
            with storage_errors(self.path):
                (self.path / "cells").mkdir(parents=True, exist_ok=True)
                sync_folder(self.path.parent)
            self.journal.append(begin)
            self.write_config(begin.config)
        except BaseException:
            self.clear()
            self.remove_if_free(created)
            raise

    def begin(self) -> Begin | None:
        """How the run began, with its newest configuration; ``None`` if the folder holds no run."""
        return self.journal.history().begin

    def config(self) -> str | None:
        """The run's ``config.toml`` as it was written, or ``None`` if the folder holds no run."""
        begin = self.begin()
        return None if begin is None else begin.config

    def configure(self, config: str) -> None:
        """Write ``config.toml`` anew; what the journal says of it counts."""
        self.journal.append(Configure(config))
        self.write_config(config)

    def restore_config(self) -> bool:
        """Write ``config.toml`` again if it is not as it was written; whether it was not."""
        config, path = self.config(), self.path / "config.toml"
        with storage_errors(path):
            if config is None or (path.is_file() and path.read_bytes() == config.encode()):
                return False
        self.write_config(config)
        return True

    def write_config(self, config: str) -> None:
        """Write ``config.toml``, durably."""
        path = self.path / "config.toml"
        self.usage.took(len(config.encode()))
        self.usage.replaces(path)
        write_text(path, config)

    def is_run(self) -> bool:
        """Whether the folder holds a run of ours: one that its journal knows, damaged though it may be."""
        return self.journal.is_begun()

    def is_free(self) -> bool:
        """Whether a new run may go here: nothing is there, or a folder with no more than a run's first, empty files."""
        if self.path.is_file():
            return False
        return not self.path.exists() or all(_is_bare(member) for member in self.path.iterdir())

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove a run of ours, and nothing else; its lock stays, which is held, and latents named in ``keep``.

        Raises:
            InputError: the folder holds something other than a run.
        """
        if not (self.is_run() or self.is_free()):
            raise InputError(f"{self.path}: holds no edgetrain run, so --force does not remove it")
        with storage_errors(self.path):
            for name in _MEMBERS:
                temporary_of(self.path / name).unlink(missing_ok=True)
                if name != "lock":
                    (self.path / name).unlink(missing_ok=True)
        if keep:
            self.clear_working_files(keep)
        for name in _FOLDERS:
            if name != "latents" or not keep:
                shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_if_free(self, created: Sequence[Path]) -> None:
        """If no run was begun in the folder, empty it and remove those of the folders ``created`` that are empty."""
        if not (self.path.is_dir() and self.is_free()):
            return
        with contextlib.suppress(OSError):
            for member in self.path.iterdir():
                member.rmdir() if member.is_dir() else member.unlink()
            for folder in created:
                folder.rmdir()

    def clear_working_files(self, keep: Container[str] = ()) -> None:
        """Remove scratch cells and all latents but ``keep``, by file name."""
        shutil.rmtree(self.units.scratch, ignore_errors=True)
        for path in self.latents.glob("*"):
            if path.name not in keep:
                with storage_errors(path):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.latents.rmdir()

    def save(self, checkpoint: Checkpoint, units: Iterable[tuple[str, Kinds | Spilled]]) -> Files:
        """Make units durable together with everything in the checkpoint before; returns all files.

        Args:
            checkpoint: without files.
            units: each changed unit's name and content, taken one at a time. What is spilled is moved, not written
                again.

        Raises:
            StorageError: the disk refused; the checkpoint before still holds.
        """
        before = self.files()
        files, changed = {unit: dict(kinds) for unit, kinds in before.items()}, []
        for unit, content in units:
            write = self.units.adopt if isinstance(content, Spilled) else self.units.write
            files[unit] = write(unit, checkpoint.number, content)  # type: ignore[arg-type]
            changed.append(unit)
        self.journal.append(structs.replace(checkpoint, files=files))
        for unit in changed:
            self.units.remove(before.get(unit, {}))
        return files

    def finish(self, checkpoint: Checkpoint) -> Files:
        """Give the files of the newest checkpoint their final names, in a last checkpoint."""
        files = self.units.name_finally(self.files())
        with storage_errors(self.path):
            (self.path / REPORT).unlink(missing_ok=True)  # it says that the run is unfinished
        self.journal.append(structs.replace(checkpoint, files=files, finished=True))
        self.units.keep_only(files)
        return files

    def last(self) -> Checkpoint | None:
        """The newest checkpoint, or ``None``."""
        return self.journal.last()

    @property
    def next_number(self) -> int:
        """Of the next checkpoint."""
        last = self.last()
        return 1 if last is None else last.number + 1

    def files(self) -> Files:
        """The files of the newest checkpoint."""
        last = self.last()
        return {} if last is None else last.files

    def results(self) -> dict[str, FileEntry]:
        """The model and the record of a finished run; empty while it is unfinished."""
        return self.journal.history().results

    def is_finished(self) -> bool:
        """Whether the run is finished, and model and record are as they were written."""
        found = self.results()
        try:
            for name, file in found.items():
                verify(self.path / name, file.checksum, file.size)
        except (CorruptError, StorageError):
            return False
        return bool(found)

    def read_record(self) -> str:
        """What ``record.json`` holds.

        Raises:
            CorruptError: it is damaged.
            InputError: the run is unfinished, or there is none.
        """
        known, path = self.results().get(RECORD), self.path / RECORD
        if known is not None and not path.exists():
            raise InputError(f"{path}: is missing; fit --resume --run-dir {self.path} makes it again")
        if known is None:
            unfinished = "an unfinished run; finish it with fit --resume" if self.is_run() else "no run"
            raise InputError(f"{self.path}: holds {unfinished}")
        try:
            if known.size > _LARGEST_RECORD:
                raise CorruptError(f"{path}: is said to hold {known.size} bytes, expected at most {_LARGEST_RECORD}")
            verify(path, known.checksum, known.size)
        except CorruptError as error:
            raise CorruptError(f"{error}; fit --resume --run-dir {self.path} makes it again") from None
        with storage_errors(path):
            return path.read_text(encoding="utf-8")

    def write_results(self, model: Mapping[str, Any], record: Callable[[], Mapping[str, Any]]) -> None:
        """Write ``model.safetensors`` from the cells' files without gathering it in memory, then ``record.json``.

        Args:
            model: metadata of the model.
            record: what the run measured, asked for when the model is written.

        Raises:
            CorruptError: a cell's file is not as it was checkpointed.
            StorageError: the disk refused; the run is then not finished.
        """
        weights = [(unit, kinds["weights"]) for unit, kinds in sorted(self.files().items())]
        parts = [(f"{unit}.", self.units.verified(file)) for unit, file in weights]
        model_file = join(self.path / MODEL, parts, model)
        self.usage.stored(model_file.size)
        self.usage.stored(len(_json(record())))
        content = _json(record())  # the size of the record itself is now a part of what it says
        write_bytes(self.path / RECORD, content)
        record_file = FileEntry(RECORD, xxhash.xxh3_128_hexdigest(content), len(content))
        self.journal.append(Results({MODEL: model_file, RECORD: record_file}))


def _json(record: Mapping[str, Any]) -> bytes:
    return json.format(json.encode(record), indent=2) + b"\n"


def _is_bare(member: Path) -> bool:
    """Whether a file or folder is what a run that has not begun may leave."""
    if member.is_dir():
        return member.name == "cells" and not member.is_symlink() and not any(member.iterdir())
    return member.name in ("lock", "journal.jsonl") and member.stat().st_size < len(BEGINNING)
