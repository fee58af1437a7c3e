"""Which rows a run is evaluated on, and that its own are still what they were, from whatever folder."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machine import stopped_after

import edgetrain
from edgetrain.config import resolve
from edgetrain.errors import InputError
from edgetrain.store.run import RunFolder
from edgetrain.training.config_file import settings_of

DRAW = np.random.default_rng(0)
TABLE, LABELS = DRAW.normal(size=(300, 6)), np.arange(300) % 2
KINDS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "table": (TABLE, {}),
    "images": (DRAW.integers(0, 256, (300, 5, 4, 3), np.uint8), {}),
    "pixels": (DRAW.integers(0, 256, (300, 64), np.uint8), {"input": "image"}),
    "tokens": (DRAW.integers(1, 9, (300, 5)), {"input": "tokens"}),
    "signals": (DRAW.normal(size=(300, 7, 2)), {"input": "signal", "channels": "last"}),
}
QUICK = {"epochs": 1, "batch_size": 64, "device": "cpu", "threads": 1}


def saved(path: Path, inputs: np.ndarray = TABLE, labels: np.ndarray = LABELS, parts: bool = False) -> Path:
    if parts:
        x, y, x_test, y_test = inputs[:240], labels[:240], inputs[240:], labels[240:]
        np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    else:
        np.savez(path, x=inputs, y=labels)
    return path


def fitted(folder: Path, data: Any, **values: Any) -> edgetrain.Run:
    data = str(data) if isinstance(data, Path) else data
    return edgetrain.fit("mlp:8x2", data, run_dir=folder, **{**QUICK, **values})


# -- which rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_held_out_rows_of_a_file_that_was_trained_on_are_evaluated(tmp_path: Path, kind: str) -> None:
    inputs, reading = KINDS[kind]
    run = fitted(tmp_path / "run", saved(tmp_path / "rand.npz", inputs), **reading)
    copy = shutil.copy(tmp_path / "rand.npz", tmp_path / "copy.npz")
    own = run.evaluate()
    assert own.data == "the 60 held-out rows of rand.npz; the run was trained on the other 240"
    for data, name in ((tmp_path / "rand.npz", "rand.npz"), (copy, "copy.npz")):
        found = run.evaluate(str(data))
        assert found.data == f"the 60 held-out rows of {name}; the run was trained on the other 240"
        assert (found.rows, found.accuracy) == (60, own.accuracy)
    assert run.evaluate((inputs, LABELS)).data == own.data.replace("rand.npz", "arrays")
    assert own.accuracy["sum"] == run.record.test_accuracy


@pytest.mark.parametrize("method", ["bp", "lbp-ae"])
def test_held_out_rows_are_known_whatever_the_method_scales(tmp_path: Path, method: str) -> None:
    run = fitted(tmp_path / "run", saved(tmp_path / "rand.npz"), method=method)
    assert run.evaluate(str(tmp_path / "rand.npz")).rows == 60


def test_other_rows_are_evaluated_whole(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", saved(tmp_path / "rand.npz"))
    changed = TABLE.copy()
    changed[17, 3] += 1e-6
    other = {
        "changed": (changed, LABELS),
        "other labels": (TABLE, 1 - LABELS),
        "fewer": (TABLE[:299], LABELS[:299]),
        "one class": (TABLE[:9], np.zeros(9, int)),
        "gaps": (TABLE[:9], np.ones(9, int)),
        "few": (TABLE[:2], LABELS[:2]),
    }
    for name, (inputs, labels) in other.items():
        found = run.evaluate(str(saved(tmp_path / f"{name}.npz", inputs, labels)))
        assert found.data == f"all {len(inputs)} rows of {name}.npz"
        assert found.rows == len(inputs)


def test_test_rows_of_files_of_four_and_of_known_sets(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", saved(tmp_path / "four.npz", parts=True))
    assert run.evaluate().data == run.evaluate(str(tmp_path / "four.npz")).data == "the 60 test rows of four.npz"
    digits = fitted(tmp_path / "digits", "digits")
    assert digits.evaluate().data == digits.evaluate("digits").data == "the 360 test rows of digits"
    np.savez(tmp_path / "two.npz", x_train=TABLE, y_train=LABELS)
    with pytest.raises(InputError, match=r"two\.npz: holds x_train, y_train; expected x or x_test"):
        run.evaluate(str(tmp_path / "two.npz"))


def test_rows_that_were_all_trained_on_are_said_to_be(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", (TABLE, LABELS))
    assert run.evaluate((TABLE, LABELS)).data == "all 300 rows of arrays, on which the run was trained"
    with pytest.raises(InputError, match="arrays in memory; give the rows"):
        run.evaluate()


# -- paths and digests ---------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders, each with a ``my.npz`` of its own; the first is the current one."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    saved(first / "my.npz", parts=True)
    saved(second / "my.npz", TABLE[::-1], parts=True)
    monkeypatch.chdir(first)
    return first, second


@pytest.mark.parametrize("spec", ["my.npz", "./my.npz", "../first/my.npz", "~/my.npz"])
def test_a_relative_path_means_the_same_from_every_folder(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    first, second = folders
    monkeypatch.setenv("HOME", str(first))
    run = fitted(Path("run"), spec)
    assert Path(settings_of(Path("run")).data).is_absolute()
    assert Path(json.loads(Path("run/record.json").read_text())["run"]) == first / "run"
    expected = run.evaluate().accuracy
    monkeypatch.chdir(second)
    monkeypatch.setenv("HOME", str(second))
    assert run.evaluate().accuracy == edgetrain.open_run(first / "run").evaluate().accuracy == expected
    assert edgetrain.append_cells(run, "mlp:8x3").record.run == str(first / "run")


def test_a_run_goes_on_from_another_folder(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = folders
    alone = fitted(first / "alone", "my.npz")
    stopped_after(3, resolve({**QUICK, "net": "mlp:8x2", "data": "my.npz"}, None, {}), first / "run", None)
    monkeypatch.chdir(second)
    with pytest.raises(InputError, match="data 'my': its training rows are not those that"):
        edgetrain.fit("mlp:8x2", "my.npz", run_dir=first / "run", resume=True)
    run = edgetrain.fit("mlp:8x2", str(first / "my.npz"), run_dir=first / "run", resume=True)
    assert run.record.test_accuracy == alone.record.test_accuracy


@pytest.mark.parametrize("finished", [True, False])
def test_a_file_that_has_moved_may_be_given_by_its_new_path(folders: tuple[Path, Path], finished: bool) -> None:
    first, second = folders
    if finished:
        fitted(first / "run", "my.npz")
    else:
        stopped_after(3, resolve({**QUICK, "net": "mlp:8x2", "data": "my.npz"}, None, {}), first / "run", None)
    moved = (first / "my.npz").rename(second / "moved.npz")
    run = edgetrain.fit("mlp:8x2", str(moved), run_dir=first / "run", resume=True)
    assert run.record.test_accuracy == run.evaluate(str(moved)).accuracy["sum"]
    if not finished:
        assert run.evaluate().data == "the 60 test rows of moved.npz"
    with pytest.raises(InputError, match="are not those that"):
        edgetrain.fit("mlp:8x2", str(second / "my.npz"), run_dir=first / "run", resume=True)
    with pytest.raises(InputError, match="was begun with data"):
        edgetrain.fit("mlp:8x2", "digits", run_dir=first / "run", resume=True)


def replaced(folder: Path, x_test: np.ndarray | None, y_test: np.ndarray | None) -> None:
    """Write other test rows into the place of the run's data."""
    test = {} if x_test is None else {"x_test": x_test, "y_test": y_test}
    np.savez(folder / "my.npz", x_train=TABLE[:240], y_train=LABELS[:240], **test)


def without_the_lock(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


OTHER_TEST_ROWS = {
    "rows": (TABLE[240:] + 1, LABELS[240:]),
    "labels": (TABLE[240:], 1 - LABELS[240:]),
    "fewer": (TABLE[250:], LABELS[250:]),
    "none": (None, None),
}


@pytest.mark.parametrize("case", OTHER_TEST_ROWS)
def test_other_test_rows_are_refused_and_nothing_is_written(folders: tuple[Path, Path], case: str) -> None:
    first, _ = folders
    run = fitted(first / "run", "my.npz")
    stopped_after(3, resolve({**QUICK, "net": "mlp:8x2", "data": "my.npz"}, None, {}), first / "other", None)
    before = without_the_lock(first / "run")
    replaced(first, *OTHER_TEST_ROWS[case])
    said = "its test rows are not those that .* was trained with"
    with pytest.raises(InputError, match=said if case != "none" else "holds no test rows"):
        run.evaluate()
    with pytest.raises(InputError, match=said):
        edgetrain.append_cells(run, "mlp:8x3")
    with pytest.raises(InputError, match=said):
        edgetrain.retrain_cells(run, 2)
    assert without_the_lock(first / "run") == before
    with pytest.raises(InputError, match=said):
        edgetrain.fit("mlp:8x2", "my.npz", run_dir=first / "other", resume=True)
    saved(first / "my.npz", parts=True)
    assert edgetrain.fit("mlp:8x2", "my.npz", run_dir=first / "other", resume=True).record.cells
    assert run.evaluate().rows == 60


def test_test_rows_that_come_later_are_refused(folders: tuple[Path, Path]) -> None:
    first, _ = folders
    replaced(first, None, None)
    run = fitted(first / "run", "my.npz")
    last = RunFolder(run.path).last()
    assert last is not None
    assert last.test is None
    saved(first / "my.npz", parts=True)
    with pytest.raises(InputError, match="its test rows are not those that"):
        run.evaluate()


def test_a_known_set_from_another_folder_is_held_against_the_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(folder: Path, seed: int) -> None:
        (folder / "mnist").mkdir(parents=True)
        for part, rows, pixels in (("train", 40, 0), ("t10k", 20, seed)):
            images = np.random.default_rng(pixels).integers(0, 256, (rows, 4, 4), np.uint8)
            names = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
            labels = (np.arange(rows) % 10).astype(np.uint8)
            content = struct.pack(">4I", 0x803, rows, 4, 4) + images.tobytes()
            (folder / "mnist" / names[0]).write_bytes(gzip.compress(content))
            (folder / "mnist" / names[1]).write_bytes(gzip.compress(struct.pack(">2I", 0x801, rows) + labels.tobytes()))

    for seed in (1, 2):
        put(tmp_path / str(seed), seed)
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path / "1"))
    run = fitted(tmp_path / "run", "mnist")
    assert run.evaluate().data == "the 20 test rows of mnist"
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path / "2"))
    with pytest.raises(InputError, match="data 'mnist': its test rows are not those that"):
        run.evaluate()


def test_printed_configurations_have_absolute_paths(folders: tuple[Path, Path], capsys: Any) -> None:
    from edgetrain.cli.main import cli

    cli.main(["fit", "--data", "my.npz", "--print-config"], standalone_mode=False)
    assert f'data = "{os.getcwd()}/my.npz"' in capsys.readouterr().out
