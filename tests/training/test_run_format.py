"""Runs of other versions are refused by their format. ``pytest tests/training/test_run_format.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from machine import data, finished, settings

from edgetrain.errors import InputError
from edgetrain.store.entries import FORMAT
from edgetrain.store.journal import _check
from edgetrain.training import edits
from edgetrain.training.fit import fit
from edgetrain.training.resuming import resumed_settings
from edgetrain.training.run import Run


def of_format(path: Path, number: int | None) -> None:
    """Write the journal as a version did that knew no formats (``None``), or another one."""
    journal = path / "journal.jsonl"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    entry = json.loads(first)["entry"]
    assert entry.pop("format") == FORMAT
    if number is not None:
        entry["format"] = number
    content = json.dumps(entry, sort_keys=True).encode()
    journal.write_bytes(b'{"check": "%s", "entry": %s}\n' % (_check(content), content) + b"".join(others))


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
