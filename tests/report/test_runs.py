"""What can be read of whole, unfinished and damaged runs. ``pytest tests/report/test_runs.py``."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from machine import data, settings, stopped_after

from edgetrain.errors import InputError, StorageError
from edgetrain.memory import energy
from edgetrain.memory.energy import Sensor
from edgetrain.report.page import write_report
from edgetrain.report.runs import open_shown
from edgetrain.store.journal import Journal
from edgetrain.training.fit import fit

ROWS = data("pixels").set


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    fit(settings("lbp-ae", net="mlp:24x2"), path, data=ROWS)
    return path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stopped") / "run"
    stopped_after(25, settings("mf", net="mlp:24x2"), path, ROWS)  # in the second cell
    return path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flipped(path: Path, at: int = -20) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_finished_run_is_shown_whole(finished: Path) -> None:
    shown = open_shown(finished)
    assert shown.finished
    assert shown.problems == []
    assert shown.record is not None
    assert shown.record.test_accuracy is not None
    assert shown.settings is not None
    assert shown.settings.method == "lbp-ae"
    assert 'method = "lbp-ae"' in shown.config


def test_of_an_unfinished_run_the_newest_checkpoint_is_shown(stopped: Path, tmp_path: Path) -> None:
    shown = open_shown(stopped)
    assert not shown.finished
    assert [problem for problem in shown.problems if "is not finished" in problem and "--resume" in problem]
    assert shown.record is not None
    assert shown.record.cells[0].losses
    assert shown.record.test_accuracy is None
    page, figures, problems = write_report([stopped], tmp_path)
    assert "is not finished" in page.read_text()
    assert {path.stem for path in figures} >= {"losses", "cells"}
    assert problems == shown.problems


def test_an_unfinished_run_s_classifier_is_no_cell(tmp_path: Path) -> None:
    path = tmp_path / "a run"
    stopped_after(40, settings("lbp-ae", net="mlp:24x2"), path, ROWS)
    record = open_shown(path).record
    assert record is not None
    assert [cell.name for cell in record.cells] == ["linear 21-24", "linear 24-24"]
    assert record.classifier is not None
    assert record.written_mb
    assert any(f"--resume --run-dir '{path}'" in problem for problem in open_shown(path).problems)


def test_an_unfinished_run_tells_the_energy_of_its_newest_checkpoint(tmp_path: Path) -> None:
    told = Sensor("made up", 1000.0, lambda: 5.0)
    with mock.patch.object(energy, "sensor_of", return_value=told):
        stopped_after(25, settings("mf", net="mlp:24x2"), tmp_path / "run", ROWS)
    record = open_shown(tmp_path / "run").record
    assert record is not None
    assert record.energy_j is not None
    assert record.energy_j % 5.0 == 0
    assert record.energy_j > 0


def test_a_journal_that_cannot_be_opened_is_a_problem_of_one_run(
    finished: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Journal) -> bool:
        if self.path.parent == copied:
            raise StorageError(f"{self.path}: permission denied")
        return True

    monkeypatch.setattr(Journal, "is_begun", refused)
    page, _, problems = write_report([copied, finished], tmp_path / "out")
    assert any("permission denied" in problem for problem in problems)
    assert page.exists()


def test_a_page_of_an_unfinished_run_goes_when_it_is_finished(tmp_path: Path) -> None:
    asked = settings("mf", net="mlp:24x2")
    stopped_after(25, asked, tmp_path / "run", ROWS)
    write_report([tmp_path / "run"])
    fit(asked, tmp_path / "run", data=ROWS, resume=True)
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("broken", "told", "known"),
    [
        ("record.json", "record.json", True),  # what the journal's last entry knows
        ("model.safetensors", "model.safetensors", True),
        ("cells/001.safetensors", "001.safetensors", True),
        ("cells/000.optim.safetensors", "000.optim.safetensors", True),
        ("journal.jsonl", "journal.jsonl", True),  # from record.json, unverified
    ],
)
@pytest.mark.parametrize("how", ["flipped", "empty", "missing"])
def test_what_is_damaged_is_named_and_the_rest_is_shown(
    broken: str, told: str, known: bool, how: str, copied: Path, tmp_path: Path
) -> None:
    if how == "flipped":
        flipped(copied / broken, 40)
    elif how == "empty":
        (copied / broken).write_bytes(b"")
    else:
        (copied / broken).unlink()
    shown = open_shown(copied)
    assert any(told in problem for problem in shown.problems), shown.problems
    assert (shown.record is not None) == known
    page, figures, problems = write_report([copied], tmp_path / "out")
    assert problems == shown.problems
    assert figures
    assert told in page.read_text()


def test_without_journal_and_record_only_the_problems_are_shown(copied: Path, tmp_path: Path) -> None:
    (copied / "record.json").write_text('{"cells": 3}')
    (copied / "journal.jsonl").write_text("nothing")
    page, figures, problems = write_report([copied], tmp_path / "out")
    assert figures == []
    assert len(problems) >= 2
    assert "Nothing is known of its cells" in page.read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("nothing", "file", "folder"):
        with pytest.raises(InputError, match=name):
            open_shown(tmp_path / name)


def test_any_damage_at_all_gives_a_page(finished: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(7)
    for number in range(40):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        path = files[draw.integers(len(files))]
        content = bytearray(path.read_bytes())
        for at in draw.integers(0, len(content), 3):
            content[at] ^= 1 << int(draw.integers(8))
        path.write_bytes(content[: draw.integers(1, len(content) + 1)] if number % 2 else content)
        try:
            open_shown(folder)
        except InputError as error:
            assert "holds no run" in str(error)
        shutil.rmtree(folder)
