"""What people type: sizes, lists, misspelt variables, and what can be chosen."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from torch import nn

import edgetrain
from edgetrain.cli.main import COMMANDS, cli
from edgetrain.config import Settings, parse_numbers, parse_size, resolve
from edgetrain.data.known import KNOWN
from edgetrain.errors import EdgetrainWarning, InputError
from edgetrain.nets.spec import NETS
from edgetrain.training.methods import METHODS
from edgetrain.training.resuming import run_folder
from edgetrain.units import MIB, from_mb, stated_mb

SMALL: dict[str, Any] = {"epochs": 1, "device": "cpu", "threads": 1}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command prints on stdout, carried out in this process."""

    def command(*words: str) -> str:
        capsys.readouterr()
        cli.main([*words], standalone_mode=False)
        return capsys.readouterr().out

    return command


# --- sizes and lists ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("512", "MB", 512.0),
        ("512MB", "MB", 512.0),
        ("512 MiB", "MB", 512.0),
        ("0.5GB", "MB", 512.0),
        ("1g", "MB", 1024.0),
        ("2048kb", "MB", 2.0),
        ("512MB", "GB", 0.5),
        ("1e2", "GB", 100.0),
    ],
)
def test_sizes_may_have_a_unit(text: str, unit: str, expected: float) -> None:
    assert parse_size(text, unit) == expected


@pytest.mark.parametrize("text", ["", "MB", "5x", "5 5", "five", "5MBB", "0x10"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number of MB, such as 512, 512MB or 0.5GB"):
        parse_size(text, "MB")


def test_sizes_and_lists_work_as_flags_and_variables(said: Any) -> None:
    stated = said("fit", "--max-gpu-mb", "0.5GB", "--micro-batch", "4,8", "--tiles", "2", "--print-config")
    assert "max_gpu_mb = 512.0\n" in stated
    assert "micro_batch = [\n    4,\n    8,\n]\n" in stated
    variables = {"EDGETRAIN_MAX_DISK_GB": "512MB", "EDGETRAIN_TILES": "3,4", "EDGETRAIN_MICRO_BATCH": "7"}
    found = resolve({}, None, variables)
    assert (found.max_disk_gb, found.tiles, found.micro_batch) == (0.5, [3, 4], 7)
    with pytest.raises(InputError, match="EDGETRAIN_TILES='3,x': expected a whole number, or several"):
        resolve({}, None, {"EDGETRAIN_TILES": "3,x"})
    with pytest.raises(click.BadParameter, match="expected a whole number"):
        said("plan", "--micro-batch", "4,")
    assert parse_numbers("4") == 4


@pytest.mark.parametrize("size", [0.01, 0.1, 3.3, 512.0, 16.886, 2.5])
def test_a_limit_is_quoted_as_it_was_typed(size: float) -> None:
    text = stated_mb(from_mb(size))
    assert text == f"{size:.15g}"
    assert from_mb(float(text)) == from_mb(size)


def test_large_limits_are_quoted_in_full() -> None:
    assert [stated_mb(size * MIB) for size in (512, 1000, 1_000_000)] == ["512", "1000", "1000000"]


# --- nothing is changed or ignored in silence ---------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch": 65, "batch_size": 64}, "--micro-batch 65 is larger than --batch-size 64"),
        ({"micro_batch": [8, 65], "batch_size": 64}, "--micro-batch 65 is larger than --batch-size 64"),
        ({"tiles": 17}, "--tiles 17: the widest cell has 16 units"),
    ],
)
def test_values_that_would_be_cut_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        edgetrain.fit("mlp:16,9", "digits", run_dir="r", **SMALL, **values)
    assert not Path("r").exists()


def test_more_threads_than_cores_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.warns(EdgetrainWarning, match="--threads 2 on 1 cores: more threads"):
        edgetrain.fit("mlp:4", "digits", run_dir="r", epochs=1, device="cpu", threads=2)


def test_misspelt_variables_are_refused() -> None:
    with pytest.raises(InputError, match="EDGETRAIN_EPOCH: unknown setting; did you mean 'EDGETRAIN_EPOCHS'"):
        resolve({}, None, {"EDGETRAIN_EPOCH": "3"})
    resolve({}, None, {"EDGETRAIN_DATA": "x", "EDGETRAIN_DEBUG": "1", "EDGETRAIN_XYZZY": "1", "HOME": "/"})


def test_one_class_is_refused() -> None:
    rows = np.random.default_rng(0).random((20, 4)).astype(np.float32)
    for label in (0, 1):
        with pytest.raises(InputError, match=f"all training rows have label {label}; expected at least two classes"):
            edgetrain.fit("mlp:4", (rows, np.full(20, label)), run_dir="r", **SMALL)
    assert not Path("r").exists()


@pytest.mark.parametrize("name", ["net", "method"])
def test_code_runs_only_if_the_command_line_names_it(name: str) -> None:
    Path("evil.py").write_text("raise SystemExit('it ran')")
    Path("p.toml").write_text(f'{name} = "evil.py:build"\n')
    for profile, variables in (("p.toml", {}), (None, {f"EDGETRAIN_{name.upper()}": "evil.py:build"})):
        with pytest.raises(InputError, match=f"names code, which is run only if the command line names it.*--{name}"):
            resolve({}, profile, variables)
        assert getattr(resolve({name: "own.py:mine"}, profile, variables), name) == "own.py:mine"


def test_a_plan_says_when_backpropagation_fits_too(said: Any) -> None:
    words = ("plan", "--data", "digits", "--net", "mlp:16x2")
    assert "It fits the budget too" in said(*words, "--max-gpu-mb", "4")
    assert "It fits the budget too" not in said(*words, "--max-gpu-mb", "0.03")
    assert "It fits the budget too" not in said(*words)


# --- folders ------------------------------------------------------------------------------------


def test_runs_that_start_at_once_get_a_folder_each() -> None:
    with run_folder(None, "digits", "mf") as first, run_folder(None, "digits", "mf") as second:
        assert [str(first), str(second)] == ["runs/digits-mf", "runs/digits-mf-2"]
        (second / "kept").touch()
    assert sorted(map(str, Path("runs").iterdir())) == ["runs/digits-mf-2"]
    with pytest.raises(KeyError), run_folder(None, "my.npz", "rule.py:Mine") as path:
        assert str(path) == "runs/my-mine"
        raise KeyError
    assert not path.exists()


def test_a_home_folder_is_understood_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = edgetrain.fit("mlp:4", "digits", run_dir="~/r", **SMALL)
    assert run.path == tmp_path / "r"
    assert edgetrain.open_run("~/r").path == run.path


# --- runs as objects ----------------------------------------------------------------------------


def test_a_run_has_a_short_name_and_can_be_pickled() -> None:
    run = edgetrain.fit("mlp:4x2", "digits", run_dir="r", **SMALL)
    assert repr(run) == f"Run({str(run.path)!r}: mf on 'digits', 2 cells, test accuracy {run.record.test_accuracy:.4f})"
    assert pickle.loads(pickle.dumps(run)).evaluate().accuracy == run.evaluate().accuracy
    own = edgetrain.fit([nn.Linear(64, 5)], "digits", run_dir="own", **SMALL)
    with pytest.raises(TypeError, match=r"its net is your own code.*open_run\(path, net=...\)"):
        pickle.dumps(own)


def test_a_dead_cell_is_a_warning_where_nothing_is_shown() -> None:
    with pytest.warns(EdgetrainWarning, match="did not change in its first epoch"):
        edgetrain.fit("mlp:4", "digits", run_dir="r", lr=1e-30, **SMALL)


# --- help and lists -----------------------------------------------------------------------------


def test_every_flag_stands_under_a_heading_with_its_default(said: Any) -> None:
    text = said("fit", "--help")
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Data:", "Network and method:", "Training:", "Budgets:", "Device and precision:", "Checkpoints and run time:",
        "Options:",
    ]  # fmt: skip
    joined = " ".join(text.split())
    for default in (Settings().epochs, Settings().batch_size, Settings().seed, Settings().latent_dtype):
        assert f"[default: {default}]" in joined


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_an_example(command: str, said: Any) -> None:
    assert "Example" in "\n".join(said(command, "--help").strip().splitlines()[-6:])


@pytest.mark.parametrize(
    ("words", "names"), [(("methods",), METHODS), (("nets",), NETS), (("data", "list"), ["digits", *KNOWN])]
)
def test_what_can_be_chosen_is_listed(words: tuple[str, ...], names: Any, said: Any) -> None:
    listed, rows = said(*words), json.loads(said(*words, "--json"))
    assert {row["name"] for row in rows} >= set(names)
    for row in rows:
        assert row["summary"]
        assert row.get("example", row["name"]) in listed


def test_data_that_are_here_are_told_apart(said: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = {row["name"]: row["here"] for row in json.loads(said("data", "list", "--json"))}
    assert here["digits"]
    assert not here["mnist"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Downloaded when first used" in said("data", "list")
