"""The journal: one line for each thing that became durable; what is not in it did not happen.

Lines are JSON with a checksum of their own. A torn last line (the power failed while it was written) is
ignored; damage anywhere else is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import xxhash
from msgspec import MsgspecError, Raw, Struct, json, structs

from edgetrain.errors import CorruptError, InputError
from edgetrain.store.atomic import CHUNK, storage_errors, sync_folder, write_bytes
from edgetrain.store.entries import FORMAT, Begin, Checkpoint, Configure, Edit, Entry, FileEntry, Results

BEGINNING = b'{"check": "'
SLACK = 64 << 10  # bytes
_VERSIONS = {1: "edgetrain 0.1"}  # that wrote older formats
_LONGEST_LINE = 128 << 20  # bytes; a checkpoint of 100,000 cells of 40 epochs takes less


@dataclass
class History:
    """What the entries of a journal come to.

    Attributes:
        begin: how the run began, with the newest configuration; ``None``: it did not.
        edits: what was changed later.
        last: the newest checkpoint, if any.
        results: files of the model and the record of a finished run; empty while it is unfinished.
    """

    begin: Begin | None = None
    edits: list[Edit] = field(default_factory=list)
    last: Checkpoint | None = None
    results: dict[str, FileEntry] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Take in the next entry."""
        if isinstance(entry, Begin):
            self.begin = entry
        elif isinstance(entry, Configure):
            self.begin = None if self.begin is None else structs.replace(self.begin, config=entry.config)
        elif isinstance(entry, Edit):
            self.edits.append(entry)
        elif isinstance(entry, Checkpoint):
            self.last, self.results = entry, {}
        else:
            self.results = entry.files

    def entries(self) -> Iterator[Entry]:
        """The fewest entries with the same history."""
        if self.begin is not None:
            yield self.begin
        yield from self.edits
        if self.last is not None:
            yield self.last
        if self.results:
            yield Results(self.results)


class Journal:
    """A file of JSON lines, fsynced line by line.

    Where it would grow beyond twice what is needed plus ``SLACK``, it is replaced by what is needed.

    Args:
        path: the file.
        on_space: called with the bytes taken on disk (negative: freed).
    """

    def __init__(self, path: Path, on_space: Callable[[int], None] = lambda size: None):
        self.path, self._on_space = path, on_space
        self._known: tuple[tuple[int, int], History] | None = None  # with the version that it was read from

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
            history = History()
            for each in (*self.entries(), entry):
                history.add(each)
            needed = b"".join(map(_line, history.entries()))
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
        """All entries, oldest first, one at a time; none if the file does not exist.

        Raises:
            CorruptError: a line that was written whole is damaged, or is not an entry.
            InputError: the run folder has another format, of an older or a newer version.
        """
        if not self.path.exists():
            return
        with storage_errors(self.path), self.path.open("rb") as file:
            for number in count(1):
                line = file.readline(_LONGEST_LINE)
                torn = not line.endswith(b"\n")
                if torn and len(line) < _LONGEST_LINE:
                    return
                content = None if torn else _content(line)
                if content is None:
                    raise CorruptError(f"{self.path}: line {number} is damaged")
                if number == 1:
                    self._check_format(content)
                try:
                    entry = _ENTRY.decode(content)
                except (MsgspecError, ValueError, RecursionError) as error:
                    raise CorruptError(f"{self.path}: line {number} is not an entry of a journal ({error})") from error
                yield entry

    def history(self) -> History:
        """What all entries come to; see ``entries`` for what it raises. It is not to be changed."""
        version = self.version()
        if self._known is None or self._known[0] != version:
            history = History()
            for entry in self.entries():
                history.add(entry)
            self._known = version, history
        return self._known[1]

    def last(self) -> Checkpoint | None:
        """The newest checkpoint, or ``None``."""
        return self.history().last

    def _check_format(self, content: bytes) -> None:
        """Refuse a run folder of another format, by its journal's first entry.

        Raises:
            InputError: the message names both formats.
        """
        try:
            found = json.decode(content, type=_Format).format
        except (MsgspecError, ValueError, RecursionError):
            found = 0
        if found != FORMAT:
            known = _VERSIONS.get(found)
            raise InputError(
                f"{self.path.parent}: was written by {known or 'another version of edgetrain'} (run format {found});"
                f" this version reads format {FORMAT}: train it again, or use {known or 'that version'}"
            )

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


class _Line(Struct):
    check: str
    entry: Raw


class _Format(Struct):
    format: int = 1


_ENTRY = json.Decoder(Entry)


def _line(entry: Entry) -> bytes:
    content = json.encode(entry)
    return b'{"check": "%s", "entry": %s}\n' % (_check(content), content)


def _content(line: bytes) -> bytes | None:
    """The entry of a line, as it was written; ``None``: it is damaged."""
    try:
        found = json.decode(line, type=_Line)
    except (MsgspecError, ValueError, RecursionError):
        return None
    content = bytes(found.entry)
    return content if found.check == _check(content).decode() else None


def _check(content: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(content).encode()
