"""The journal: one line for each thing that became durable; what is not in it did not happen.

Lines are JSON with a check of their own. A torn last line (the power failed while it was written) is
ignored; damage anywhere else is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

import xxhash

from edgetrain.errors import CorruptError, InputError
from edgetrain.store.atomic import CHUNK, storage_errors, sync_folder, write_bytes
from edgetrain.store.tensors import FileEntry

Entry = dict[str, Any]
BEGINNING = b'{"check": "'
SLACK = 64 << 10  # bytes
FORMAT = 2  # of the run folder; it changes when an older edgetrain's runs cannot be read any more
_VERSIONS = {1: "edgetrain 0.1"}  # that wrote older formats
_SETTINGS = ("format", "config", "requested", "net", "method", "begins_with")  # of which the newest count
_LONGEST_LINE = 128 << 20  # bytes; a commit of 100,000 cells of 40 epochs takes less


class Journal:
    """A file of JSON lines, fsynced line by line.

    Where it would grow beyond twice what is needed plus ``SLACK``, it is replaced by what is needed.

    Args:
        path: the file.
        on_space: called with the bytes taken on disk (negative: freed).
    """

    def __init__(self, path: Path, on_space: Callable[[int], None] = lambda size: None):
        self.path, self._on_space = path, on_space
        self._newest: tuple[tuple[int, int], Entry | None] | None = None  # with the version that it was read from

    def append(self, entry: Entry) -> None:
        """Make an entry durable; a torn line before it is cut off first.

        Raises:
            StorageError: the disk refused.
        """
        line = _line(entry)
        with storage_errors(self.path):
            fresh = not self.path.exists()
            size = len(line) + (0 if fresh else self._whole())
        if size > SLACK + 2 * len(line):  # what is needed holds at least this line
            needed = b"".join(map(_line, _needed(chain(self.entries(), [entry]))))
            if size > SLACK + 2 * len(needed):
                self._replace(needed)
                return
        with storage_errors(self.path):
            self._on_space(len(line))
            with self.path.open("ab") as file:
                file.truncate(size - len(line))
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                sync_folder(self.path.parent)

    def is_begun(self) -> bool:
        """Whether the file is a journal of ours: its first line begins as one does."""
        if not self.path.is_file():
            return False
        with storage_errors(self.path), self.path.open("rb") as file:
            return file.read(len(BEGINNING)) == BEGINNING

    def version(self) -> tuple[int, int]:
        """Inode and bytes of the file, which change with every entry; zeros if there is none."""
        if not self.path.is_file():
            return 0, 0
        found = self.path.stat()
        return found.st_ino, found.st_size

    def entries(self) -> Iterator[Entry]:
        """All entries, oldest first, one at a time; none if there is no journal.

        Raises:
            CorruptError: a line that was written whole is damaged.
        """
        if not self.path.exists():
            return
        with storage_errors(self.path), self.path.open("rb") as file:
            for number in count(1):
                line = file.readline(_LONGEST_LINE)
                torn = not line.endswith(b"\n")
                if torn and len(line) < _LONGEST_LINE:
                    return
                entry = None if torn else _parse(line)
                if entry is None:
                    raise CorruptError(f"{self.path}: line {number} is damaged")
                yield entry

    def check_format(self) -> None:
        """Refuse a run folder that another version of edgetrain wrote in another format.

        Raises:
            InputError: the message names both formats.
        """
        if self.config() is None:  # nothing was begun
            return
        found = self._newest_of("format") or 1
        if found != FORMAT:
            known = _VERSIONS.get(found) if isinstance(found, int) else None
            raise InputError(
                f"{self.path.parent}: was written by {known or 'another version of edgetrain'} (run format {found});"
                f" this version reads format {FORMAT}: train it again, or use {known or 'that version'}"
            )

    def config(self) -> str | None:
        """The run's ``config.toml`` as it was written, or ``None`` if there is no run."""
        config = self._newest_of("config")
        if config is not None and not isinstance(config, str):
            raise CorruptError(f"{self.path}: its configuration is no text")
        return config

    def requested(self) -> dict[str, Any]:
        """The settings that the plan replaced in ``config.toml``, as they were asked for.

        Raises:
            CorruptError: the journal names none.
        """
        found = self._newest_of("requested")
        if not isinstance(found, dict | None):
            raise CorruptError(f"{self.path}: the requested settings are not a table")
        return found or {}

    def net(self) -> list[Any] | None:
        """Fingerprints of the cells that the run was begun with; ``None``: there are none.

        Raises:
            CorruptError: they are not a list.
        """
        found = self._newest_of("net")
        if not isinstance(found, list | None):
            raise CorruptError(f"{self.path}: the description of the net is not a list")
        return found

    def method(self) -> dict[str, Any]:
        """What the run's method is known by, if it is the user's own; empty otherwise.

        Raises:
            CorruptError: it is not a table.
        """
        found = self._newest_of("method")
        if not isinstance(found, dict | None):
            raise CorruptError(f"{self.path}: the description of the method is not a table")
        return found or {}

    def last(self) -> Entry | None:
        """The newest commit's entry, or ``None``."""
        version = self.version()
        if self._newest is None or self._newest[0] != version:
            newest = None
            for entry in self.entries():
                newest = entry if "files" in entry else newest
            self._newest = version, newest
        return self._newest[1]

    def results(self) -> dict[str, FileEntry]:
        """The model and the record of a finished run; empty while it is unfinished.

        Raises:
            CorruptError: the journal's entry does not name files in this folder.
        """
        found: Entry = {}
        for entry in self.entries():
            if "files" in entry:
                found = {}
            if "results" in entry:
                found = entry["results"]
        try:
            return {name: FileEntry(**file) for name, file in found.items()}
        except (TypeError, AttributeError) as error:
            raise CorruptError(f"{self.path}: names no results ({error})") from error

    def _newest_of(self, key: str) -> Any:
        found = None
        for entry in self.entries():
            found = entry.get(key, found)
        return found

    def _replace(self, content: bytes) -> None:
        before = self.version()[1]
        self._on_space(len(content))
        write_bytes(self.path, content)
        self._on_space(-before)

    def _whole(self) -> int:
        """Bytes up to the end of the last whole line, looked for from the end."""
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - CHUNK)
                file.seek(start)
                if found := file.read(end - start).rfind(b"\n") + 1:
                    return start + found
                end = start
        return 0


def _check(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry, sort_keys=True)
    return json.dumps({"check": _check(text), "entry": entry}, sort_keys=True).encode() + b"\n"


def _needed(entries: Iterable[Entry]) -> Iterator[Entry]:
    """What readers still need of a journal: the newest settings, all edits, the newest commit and its results."""
    settings: Entry = {}
    edits: list[Entry] = []
    newest: list[Entry] = []
    for entry in entries:
        settings |= {name: entry[name] for name in _SETTINGS if name in entry}
        if "edit" in entry:
            edits.append({"edit": entry["edit"]})
        if "files" in entry:
            newest = [{name: value for name, value in entry.items() if name not in (*_SETTINGS, "edit")}]
        elif "results" in entry:
            newest = [*(known for known in newest if "files" in known), entry]
    if settings:
        yield settings
    yield from edits
    yield from newest


def _parse(line: bytes) -> Entry | None:
    try:
        wrapped = json.loads(line)
        entry = wrapped["entry"]
        good = isinstance(entry, dict) and wrapped["check"] == _check(json.dumps(entry, sort_keys=True))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if good else None
