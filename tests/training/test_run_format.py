"""Runs of other versions are refused by their format. ``pytest tests/training/test_run_format.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from machine import data, finished, settings

from edgetrain.errors import InputError
from edgetrain.store.journal import FORMAT, _line
from edgetrain.training import edits
from edgetrain.training.finished import Run
from edgetrain.training.fit import fit
from edgetrain.training.resuming import resumed_settings


def of_format(path: Path, number: int | None) -> None:
    """Write the journal as a version did that knew no formats (``None``), or another one."""
    journal = path / "journal.jsonl"
    entries = [json.loads(line)["entry"] for line in journal.read_bytes().splitlines()]
    assert entries[0].pop("format") == FORMAT
    if number is not None:
        entries[0]["format"] = number
    journal.write_bytes(b"".join(map(_line, entries)))


@pytest.mark.parametrize(("number", "said"), [(None, r"edgetrain 0\.1 \(run format 1\)"), (77, r"\(run format 77\)")])
@pytest.mark.parametrize("what", ["open", "resume", "resumed settings", "drop"])
def test_a_run_of_another_format_is_refused_and_left_as_it_is(tmp_path, number, said, what):
    path = finished(tmp_path, "mf", epochs=1).path
    of_format(path, number)
    before = {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    asked = settings("mf", epochs=1)
    with pytest.raises(InputError, match=f"{said}; this version reads format {FORMAT}: train it again"):
        if what == "open":
            Run.open(path)
        elif what == "resume":
            fit(asked, path, data=data("pixels").set, resume=True)
        elif what == "resumed settings":
            resumed_settings(path, {}, asked, may_start=True)
        else:
            edits.drop(path, 2)
    assert {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_run_of_another_format_may_be_replaced(tmp_path):
    path = finished(tmp_path, "mf", epochs=1).path
    of_format(path, None)
    fit(settings("mf", epochs=1), path, data=data("pixels").set, force=True)
    assert Run.open(path).nodes
