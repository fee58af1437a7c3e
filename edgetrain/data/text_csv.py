"""Labelled texts out of a CSV file with the columns ``text``, ``label`` and ``split``, row by row.

UTF-8, plain, ``.gz`` or ``.xz``; other columns are passed over. A row takes 1 MiB at most, which
bounds its fields too, however its quotes are set.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast

from edgetrain.data.compressed import open_stream
from edgetrain.data.text import MAX_TEXT_BYTES, LabelledText
from edgetrain.errors import CorruptError, InputError

COLUMNS = ("text", "label", "split")
SPLITS = {"train": "train", "test": "test"}
_T = TypeVar("_T")


def csv_texts(path: Path, labels: Mapping[str, int]) -> Iterator[LabelledText]:
    """The texts of the file, in its order.

    Args:
        path: of the file.
        labels: the classes by what stands for them, in lower case.

    Raises:
        InputError: a column is missing, or a row holds what no row may hold.
        CorruptError: the file is damaged or no CSV.
        StorageError: the file is unreadable.
    """
    with open_stream(path) as stream:
        rows = _rows(cast(BinaryIO, stream), path)
        columns = _columns(next(rows, _Row(str(path), [])))
        for row in rows:
            _check_width(row, columns)
            text, label, split = (row.fields[column] for column in columns)
            part = _known(split, SPLITS, f"{row.where}: split")
            yield LabelledText(part, _known(label, labels, f"{row.where}: label"), text)


class _Row(NamedTuple):
    """The fields of a row, and what errors about it name."""

    where: str
    fields: list[str]


class _Lines(Iterator[str]):
    """The lines of a file for ``csv.reader``: decoded, with a limit on the bytes of a row."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._number = self._left = 0
        self._row = ""

    def begin_row(self) -> str:
        """Allow for another row; returns what errors about it name."""
        self._row = f"{self._path}: line {self._number + 1}"
        self._left = MAX_TEXT_BYTES
        return self._row

    def __next__(self) -> str:
        line = self._stream.readline(self._left + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._left -= len(line)
        if self._left < 0:
            raise InputError(f"{self._row}: a row of more than {MAX_TEXT_BYTES} bytes; shorten it or close its quote")
        return self._decoded(line)

    def _decoded(self, line: bytes) -> str:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            found = f"0x{line[error.start]:02x} at byte {error.start}"
            where = f"{self._path}: line {self._number}"
            raise InputError(f"{where}: {found} is not UTF-8; save the file as UTF-8") from error
        return text.removeprefix("\ufeff") if self._number == 1 else text


def _rows(stream: BinaryIO, path: Path) -> Iterator[_Row]:
    lines = _Lines(stream, path)
    reader = csv.reader(lines, strict=True)
    while True:
        where = lines.begin_row()
        fields = _next_fields(reader, where)
        if fields is None:
            return
        if fields:  # a blank line has none
            yield _Row(where, fields)


def _next_fields(reader: Iterator[list[str]], where: str) -> list[str] | None:
    """The next row; the module's limit on fields, which holds for all readers, is lifted only meanwhile."""
    limit = csv.field_size_limit(MAX_TEXT_BYTES)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise CorruptError(f"{where}: not readable as CSV ({error}); write the file again") from error
    finally:
        csv.field_size_limit(limit)


def _columns(header: _Row) -> list[int]:
    """Where the three columns are."""
    for name in COLUMNS:
        if header.fields.count(name) != 1:
            found = ", ".join(_shown(field) for field in header.fields[:8]) or "nothing"
            raise InputError(f"{header.where}: the header is {found}; expected {', '.join(COLUMNS)}, each once")
    return [header.fields.index(name) for name in COLUMNS]


def _check_width(row: _Row, columns: list[int]) -> None:
    if len(row.fields) <= max(columns):
        raise InputError(f"{row.where}: {len(row.fields)} fields, expected at least {max(columns) + 1}; quote the text")


def _known(field: str, values: Mapping[str, _T], where: str) -> _T:
    found = values.get(field.strip().lower())
    if found is None:
        raise InputError(f"{where} is {_shown(field)}, expected one of {', '.join(values)}")
    return found


def _shown(field: str) -> str:
    return ascii(field if len(field) <= 40 else f"{field[:40]}...")
