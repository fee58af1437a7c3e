"""A run's folder: who may work in it, what is committed, and what it costs on disk.

``config.toml``, ``journal.jsonl``, ``cells/``, ``latents/``, ``record.json``, ``model.safetensors``.
A commit writes cells under the number of the commit (``cells/003@7.safetensors``), then its journal
line, and only then removes the generation before; a finished run's cells carry plain names.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout

from edgetrain.errors import BusyError, CorruptError, InputError, StorageError
from edgetrain.store.atomic import (
    check_name,
    checksum,
    missing_folders,
    size_of,
    storage_errors,
    sync_folder,
    temporary_of,
    write_bytes,
    write_text,
)
from edgetrain.store.journal import BEGINNING, FORMAT, Entry, Journal
from edgetrain.store.tensors import (
    FileEntry,
    Spilled,
    join,
    move_durably,
    plain_name,
    read_tensors,
    write_plain,
    write_tensors,
)

RECORD, MODEL = "record.json", "model.safetensors"
REPORT = "report.html"
_RESULTS = (RECORD, MODEL, REPORT)  # of a finished run
_MEMBERS = ("config.toml", "journal.jsonl", "lock", *_RESULTS)
TENSORBOARD = "tensorboard"
EDIT, ADOPTED = "edit", "adopted"  # see ``store.edit``
_FOLDERS = ("cells", "latents", "scratch", "figures", EDIT, ADOPTED, TENSORBOARD)
Files = dict[str, dict[str, FileEntry]]  # by unit ("000", "readout"), then kind ("weights", "optim")


class RunFolder:
    """A folder that holds one run. Implements ``stream.cells.Shelf``."""

    def __init__(self, path: Path):
        self.path = self.home = path  # home: the run's folder, also of an edit within it
        self.journal = Journal(path / "journal.jsonl", self.space)
        self.written = 0
        self.peak_space = self._space = 0
        self._lock = FileLock(path / "lock", timeout=0)  # may be taken again by who holds it

    @property
    def latents(self) -> Path:
        """Where latents are cached."""
        return self.path / "latents"

    @property
    def scratch(self) -> Path:
        """Where cells wait that the host tier has no room for."""
        return self.path / "scratch"

    def space(self, size: int) -> None:
        """Count bytes allocated on disk (negative: freed)."""
        self._space += size
        self.peak_space = max(self.peak_space, self._space)

    def measure(self) -> None:
        """Count anew: what is there takes space, and nothing was written yet."""
        counted = ("cells", "scratch", *_MEMBERS)  # latents are counted when they are opened
        self._space = self.peak_space = sum(size_of(self.path / name) for name in counted)
        self.written = 0

    @property
    def occupied(self) -> int:
        """Bytes that are allocated on disk now."""
        return self._space

    def wrote(self, size: int) -> None:
        """Count bytes written to disk."""
        self.written += size

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
        for name in (*_FOLDERS, *_MEMBERS):
            if (self.path / name).is_symlink():
                raise CorruptError(f"{self.path / name}: is a link; a run folder holds none")
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

    def create(
        self,
        config: str,
        net: Sequence[Any],
        requested: Mapping[str, Any] | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a run in the folder: its ``config.toml``, and in the journal that and the net's fingerprints.

        Args:
            config: with what was planned.
            net: see ``training.identity``.
            requested: see ``Journal.requested``.
            method: see ``Journal.method``.

        Raises:
            StorageError: the disk refused; nothing is left behind.
        """
        created = missing_folders(self.path)
        try:
            with storage_errors(self.path):
                (self.path / "cells").mkdir(parents=True, exist_ok=True)
                sync_folder(self.path.parent)
            about = {"requested": dict(requested or {}), "net": list(net)} | (
                {"method": dict(method)} if method else {}
            )
            self.journal.append({"format": FORMAT, "config": config, **about})
            self.write_config(config)
        except BaseException:
            self.clear()
            self.remove_if_free(created)
            raise

    def reconfigure(self, config: str) -> None:
        """Write ``config.toml`` anew; what the journal says of it counts."""
        self.journal.append({"config": config})
        self.write_config(config)

    def config(self) -> str | None:
        """See ``Journal.config`` and ``Journal.check_format``."""
        self.journal.check_format()
        return self.journal.config()

    def restore_config(self) -> bool:
        """Write ``config.toml`` again if it is not as it was written; whether it was not."""
        config, path = self.config(), self.path / "config.toml"
        with storage_errors(path):
            if config is None or (path.is_file() and path.read_bytes() == config.encode()):
                return False
        self.write_config(config)
        return True

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
            InputError: the folder holds something that is no run.
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
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in self.latents.glob("*"):
            if path.name not in keep:
                with storage_errors(path):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.latents.rmdir()

    def commit(
        self, number: int, units: Iterable[tuple[str, Mapping[str, torch.Tensor] | Spilled]], entry: Entry
    ) -> Files:
        """Make units durable together with everything committed before; returns all files.

        Args:
            number: of this commit.
            units: each changed unit's name and named tensors, taken one at a time; tensors named
                ``optim.*`` go to a file of their own. What is spilled already is moved, not written again.
            entry: more to remember in the journal line.

        Raises:
            StorageError: the disk refused; the commit before still holds.
        """
        before = self.files()
        files = {unit: dict(kinds) for unit, kinds in before.items()}
        changed = []
        for unit, content in units:
            if isinstance(content, Spilled):
                files[unit] = self._adopt_unit(unit, number, content)
            else:
                files[unit] = self._write_unit(unit, number, content)
            changed.append(unit)
        self.append(number, files, entry)
        for unit in changed:
            self._remove(before.get(unit, {}))
        return files

    def finish(self, number: int, entry: Entry) -> Files:
        """Give the committed files their plain names and close the journal."""
        files: Files = {}
        for unit, kinds in self.files().items():
            files[unit] = {}
            for kind, file in kinds.items():
                plain = _name(unit, kind)
                with storage_errors(self.path / "cells" / plain):
                    self.cell_path(file).rename(self.path / "cells" / plain)
                files[unit][kind] = FileEntry(plain, file.checksum, file.size)
        with storage_errors(self.path / "cells"):
            sync_folder(self.path / "cells")
            (self.path / REPORT).unlink(missing_ok=True)  # it says that the run is unfinished
        self.append(number, files, {**entry, "finished": True})
        self.sweep(files)
        return files

    def last(self) -> Entry | None:
        """The newest commit's entry, or ``None``."""
        return self.journal.last()

    def commits(self) -> int:
        """The number of the newest commit; 0: there is none.

        Raises:
            CorruptError: it has no number.
        """
        last = self.last()
        number = 0 if last is None else last.get("commit")
        if type(number) is not int or number < 0:
            raise CorruptError(f"{self.journal.path}: the newest commit has no number")
        return number

    def files(self) -> Files:
        """The files of the newest commit.

        Raises:
            CorruptError: the journal's entry does not name files in this folder.
        """
        last = self.last()
        try:
            return {
                plain_name(unit): {plain_name(kind): FileEntry(**file) for kind, file in kinds.items()}
                for unit, kinds in (last["files"] if last else {}).items()
            }
        except (TypeError, AttributeError) as error:
            raise CorruptError(f"{self.journal.path}: the newest commit names no files ({error})") from error

    def results(self) -> dict[str, FileEntry]:
        """See ``Journal.results``."""
        return self.journal.results()

    def is_finished(self) -> bool:
        """Whether the run is finished, and model and record are as they were written."""
        found = self.results()
        try:
            return bool(found) and all(checksum(self.path / name) == file.checksum for name, file in found.items())
        except StorageError:
            return False

    def read_record(self) -> str:
        """What ``record.json`` holds.

        Raises:
            CorruptError: it is damaged.
            InputError: the run is unfinished, or there is none.
        """
        self.journal.check_format()
        known, path = self.results().get(RECORD), self.path / RECORD
        if known is not None and not path.exists():
            raise InputError(f"{path}: is missing; fit --resume --run-dir {self.path} makes it again")
        if known is None:
            unfinished = "an unfinished run; finish it with fit --resume" if self.is_run() else "no run"
            raise InputError(f"{self.path}: holds {unfinished}")
        if (found := checksum(path)) != known.checksum:
            raise CorruptError(
                f"{path}: checksum {found}, expected {known.checksum}: the file is damaged; fit --resume --run-dir"
                f" {self.path} makes it again"
            )
        with storage_errors(path):
            return path.read_text(encoding="utf-8")

    def cell_path(self, file: FileEntry) -> Path:
        """Where a committed file is: under its own name, or its plain one if finishing was cut short."""
        path = self.path / "cells" / file.name
        if not path.exists():
            stem, _, rest = file.name.partition("@")
            plain = self.path / "cells" / f"{stem}.{rest.partition('.')[2]}"
            if rest and plain.exists():
                return plain
        return path

    def _verified(self, file: FileEntry) -> Path:
        """Where a committed file is, which is as it was written.

        Raises:
            CorruptError: it is not.
        """
        path = self.cell_path(file)
        if (found := checksum(path)) != file.checksum:
            raise CorruptError(f"{path}: checksum {found}, expected {file.checksum}: the file is damaged")
        return path

    def read_unit(self, files: Mapping[str, FileEntry], optimizer: bool = True) -> dict[str, torch.Tensor]:
        """The tensors of a unit, verified.

        Raises:
            CorruptError: a file does not hold what was written.
        """
        tensors: dict[str, torch.Tensor] = {}
        for kind, file in files.items():
            if kind == "weights" or optimizer:
                tensors |= read_tensors(self.cell_path(file), file.checksum)
        return tensors

    def write_results(self, model: Mapping[str, Any], record: Callable[[], Mapping[str, Any]]) -> None:
        """Write ``model.safetensors`` from the cells' files without gathering it in memory, then ``record.json``.

        Args:
            model: metadata of the model.
            record: what the run measured, asked for when the model is written.

        Raises:
            CorruptError: a cell's file is not as it was committed.
            StorageError: the disk refused; the run is then not finished.
        """
        weights = [(unit, kinds["weights"]) for unit, kinds in sorted(self.files().items())]
        parts = [(f"{unit}.", self._verified(file)) for unit, file in weights]
        files = [join(self.path / MODEL, parts, model)]
        self._took(files[0].size)
        self._took(len(_json(record())))
        content = _json(record())  # the size of the record itself is now a part of what it says
        write_bytes(self.path / RECORD, content)
        files.append(FileEntry(RECORD, xxhash.xxh3_128_hexdigest(content), len(content)))
        self.journal.append({"results": {file.name: asdict(file) for file in files}})

    def spill(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> Spilled:
        """Put a unit on disk for a while, as it would be committed but without waiting for the medium.

        Raises:
            StorageError: the disk refused.
        """
        paths, checksums = {}, {}
        with storage_errors(self.scratch):
            self.scratch.mkdir(exist_ok=True)
        for kind, group in _by_kind(tensors):
            paths[kind] = self.scratch / _name(unit, kind)
            self._replaced(paths[kind])
            with storage_errors(paths[kind]):
                self._took(write_plain(paths[kind], group, {"unit": unit, "format": 1}))
            checksums[kind] = checksum(paths[kind])
        return Spilled(paths, checksums)

    def unspill(self, spilled: Spilled) -> dict[str, torch.Tensor]:
        """The tensors of a spilled unit; its files stay.

        Raises:
            CorruptError: a file does not hold what was written.
        """
        tensors: dict[str, torch.Tensor] = {}
        for kind, path in spilled.paths.items():
            tensors |= read_tensors(path, spilled.checksums[kind])
        return tensors

    def discard(self, spilled: Spilled) -> None:
        """Remove a spilled unit that was not committed."""
        for path in spilled.paths.values():
            with storage_errors(path):
                self._replaced(path)
                path.unlink(missing_ok=True)

    def _write_unit(self, unit: str, number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, FileEntry]:
        entries = {}
        for kind, group in _by_kind(tensors):
            path = self.path / "cells" / _name(f"{unit}@{number}", kind)
            entries[kind] = write_tensors(path, group, {"unit": unit, "format": 1})
            self._took(entries[kind].size)
        return entries

    def _adopt_unit(self, unit: str, number: int, spilled: Spilled) -> dict[str, FileEntry]:
        """Make a spilled unit durable under the commit's number."""
        return {
            kind: move_durably(path, self.path / "cells" / _name(f"{unit}@{number}", kind), spilled.checksums[kind])
            for kind, path in spilled.paths.items()
        }

    def write_config(self, config: str) -> None:
        """Write ``config.toml``, durably."""
        path = self.path / "config.toml"
        self.space(len(config.encode()))
        self._replaced(path)
        write_text(path, config)

    def _took(self, size: int) -> None:
        self.space(size)
        self.wrote(size)

    def _replaced(self, path: Path) -> None:
        if path.exists():
            self.space(-path.stat().st_size)

    def append(self, number: int, files: Files, entry: Entry) -> None:
        """Make an entry durable that names the files of all units."""
        plain = {unit: as_entries(kinds) for unit, kinds in files.items()}
        self.journal.append({**entry, "commit": number, "files": plain})

    def sweep(self, files: Files) -> None:
        """Remove files of cells that the run no longer has."""
        known = {file.name for kinds in files.values() for file in kinds.values()}
        with storage_errors(self.path / "cells"):
            for path in (self.path / "cells").iterdir():
                if path.name not in known:
                    path.unlink()

    def _remove(self, kinds: Mapping[str, FileEntry]) -> None:
        """Remove files that the newest commit replaced; what cannot be removed goes when the run is finished."""
        for file in kinds.values():
            with contextlib.suppress(OSError):
                (self.path / "cells" / file.name).unlink(missing_ok=True)
            self.space(-file.size)


def as_entries(kinds: Mapping[str, FileEntry]) -> dict[str, Any]:
    """A unit's files as the journal has them."""
    return {kind: asdict(file) for kind, file in kinds.items()}


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=2).encode() + b"\n"


def _is_bare(member: Path) -> bool:
    """Whether a file or folder is what a run that has not begun may leave."""
    if member.is_dir():
        return member.name == "cells" and not member.is_symlink() and not any(member.iterdir())
    return member.name in ("lock", "journal.jsonl") and member.stat().st_size < len(BEGINNING)


def _by_kind(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """A unit's tensors file by file; there is always one of weights, if only an empty one."""
    optimizer = {name: value for name, value in tensors.items() if name.startswith("optim.")}
    weights = {name: value for name, value in tensors.items() if name not in optimizer}
    for kind, group in (("weights", weights), ("optim", optimizer)):
        if group or kind == "weights":
            yield kind, group


def _name(unit: str, kind: str) -> str:
    return f"{unit}.safetensors" if kind == "weights" else f"{unit}.{kind}.safetensors"
