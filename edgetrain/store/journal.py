"""The journal: one line for each thing that became durable; what is not in it did not happen.

Lines are JSON with a check of their own. A torn last line (the power failed while it was written) is
ignored; damage anywhere else is an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from edgetrain.errors import CorruptError
from edgetrain.store.atomic import storage_errors, sync_folder

Entry = dict[str, Any]


class Journal:
    """An append-only file of JSON lines, fsynced line by line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, entry: Entry) -> None:
        """Make an entry durable.

        Raises:
            StorageError: the disk refused.
        """
        with storage_errors(self.path):
            fresh = not self.path.exists()
            torn = not fresh and self._ends_torn()
            with self.path.open("ab") as file:
                file.write(b"\n" * torn + _line(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                sync_folder(self.path.parent)

    def entries(self) -> list[Entry]:
        """All entries, oldest first; none if there is no journal.

        Raises:
            CorruptError: a line before the last is damaged.
        """
        if not self.path.exists():
            return []
        with storage_errors(self.path):
            lines = self.path.read_bytes().split(b"\n")
        found = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            entry = _parse(line)
            if entry is not None:
                found.append(entry)
            elif any(_parse(later) is not None for later in lines[number:] if later) and not _torn(line):
                raise CorruptError(f"{self.path}: line {number} is damaged")
        return found

    def _ends_torn(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


def _check(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _line(entry: Entry) -> str:
    text = json.dumps(entry, sort_keys=True)
    return json.dumps({"check": _check(text), "entry": entry}, sort_keys=True)


def _parse(line: bytes) -> Entry | None:
    try:
        wrapped = json.loads(line)
        entry = wrapped["entry"]
        good = isinstance(entry, dict) and wrapped["check"] == _check(json.dumps(entry, sort_keys=True))
    except (ValueError, KeyError, TypeError):
        return None
    return entry if good else None


def _torn(line: bytes) -> bool:
    """Whether a line is the beginning of one: appending after a torn line leaves it in the middle."""
    return not line.endswith(b"}")
