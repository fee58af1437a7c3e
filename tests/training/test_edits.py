"""Hot-plugging: cells are appended, dropped and trained anew, and the earlier ones keep every bit."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from machine import stopping_after
from torch import nn

import edgetrain
from edgetrain.config import Settings
from edgetrain.errors import BudgetError, CorruptError, DivergedError, EdgetrainWarning, InputError, Stopped
from edgetrain.store.run import RunFolder, size_of
from edgetrain.training import edits
from edgetrain.training.callbacks import Callback
from edgetrain.training.config_file import settings_of
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.training.run import Run
from edgetrain.training.stopping import Stop

TWO, THREE = "mlp:20,16", "mlp:20,16,12"


def settings(method="mf", net=TWO, **values):
    standard = {"data": "digits", "epochs": 2, "threads": 1, "device": "cpu", "seed": 3}
    return Settings().with_values({"method": method, "net": net, **standard, **values})


def files(path):
    """The bytes of every cell's files."""
    return {file.name: file.read_bytes() for file in sorted((path / "cells").iterdir())}


def first_cells(path, count):
    return {name: content for name, content in files(path).items() if name[:3] in [f"{i:03}" for i in range(count)]}


def damage(path, name="001.safetensors"):
    file = path / "cells" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mf", "lbp-ae", "ff", "sll"])
def test_two_cells_and_the_first_two_of_three_are_the_same_files(tmp_path, method):
    for name, net in (("two", TWO), ("three", THREE)):
        fit(settings(method, net, schedule="separate"), tmp_path / name)
    assert len(first_cells(tmp_path / "two", 2)) == 4
    assert first_cells(tmp_path / "two", 2) == first_cells(tmp_path / "three", 2)


@pytest.mark.parametrize("method", ["mf", "lbp-ae", "ff"])
def test_an_appended_cell_is_that_of_the_longer_run_and_the_others_are_untouched(tmp_path, method):
    fit(settings(method, THREE), tmp_path / "three")
    fit(settings(method), tmp_path / "two")
    before = first_cells(tmp_path / "two", 2)
    run = edits.append(tmp_path / "two", THREE)
    assert first_cells(tmp_path / "two", 2) == before
    assert files(tmp_path / "two") == files(tmp_path / "three")  # a classifier on all latents is trained anew
    assert run.record.test_accuracy == Run.open(tmp_path / "three").record.test_accuracy
    assert [cell.name for cell in run.record.cells] == ["linear 64-20", "linear 20-16", "linear 16-12"]
    assert "append" in run.record.edits[0]


def test_a_run_by_sequence_gets_a_cell_that_learns_from_its_finished_cells(tmp_path):
    path = tmp_path / "run"
    fit(settings(schedule="sequence"), path)
    before = first_cells(path, 2)
    run = edits.append(path, THREE, {"epochs": 4, "lr": 3e-3})
    assert first_cells(path, 2) == before
    assert [cell.epochs for cell in run.record.cells] == [2, 2, 4]
    assert run.record.votes["cells"][2] is not None


def test_dropping_a_cell_gives_the_shorter_run_and_appending_brings_it_back(tmp_path):
    fit(settings("lbp-dae"), tmp_path / "two")
    fit(settings("lbp-dae", THREE), tmp_path / "run")
    whole = files(tmp_path / "run")
    run = edits.drop(tmp_path / "run")
    assert len(run.nodes) == 2
    assert files(tmp_path / "run") == files(tmp_path / "two")
    assert edits.drop(tmp_path / "run", 2).record.cells[0].name == "linear 64-20"
    edits.append(tmp_path / "run")
    assert files(tmp_path / "run") == whole


def test_retraining_changes_a_cell_and_those_behind_it_only(tmp_path):
    path = tmp_path / "run"
    fit(settings(net=THREE), path)
    before = files(path)
    edits.retrain(path, 2, changes={"lr": 5e-3})
    after = files(path)
    assert first_cells(path, 1) == {name: before[name] for name in before if name.startswith("000")}
    assert all(after[name] != before[name] for name in before if not name.startswith(("000", "inputs")))


def test_retraining_with_nothing_changed_mends_a_damaged_cell(tmp_path):
    path = tmp_path / "run"
    fit(settings(net=THREE), path)
    before = files(path)
    damage(path)
    edits.retrain(path, 2)
    assert files(path) == before


@pytest.mark.parametrize("harm", [damage, lambda path: (path / "cells/001.safetensors").unlink()])
def test_cells_before_a_damaged_or_missing_one_predict_without_it_and_say_so(tmp_path, harm):
    fit(settings(net=THREE), tmp_path / "three")
    one = fit(settings(net="mlp:20"), tmp_path / "one")
    harm(tmp_path / "three")
    run = Run.open(tmp_path / "three")
    with pytest.warns(EdgetrainWarning, match="the 1 cells before cell 2"):
        found = run.evaluate()
    assert found.accuracy == one.evaluate().accuracy
    states = edits.list_cells(run)
    assert [state.state == "ok" for state in states] == [True, False, True]
    assert "001.safetensors" in states[1].state
    with pytest.raises(CorruptError if harm is damage else edgetrain_error(), match=r"001\.safetensors"):
        run.latents("digits", tmp_path / "latents.npy")


def edgetrain_error():
    from edgetrain.errors import StorageError

    return StorageError


def test_without_the_first_cell_nothing_predicts(tmp_path):
    path = tmp_path / "run"
    fit(settings(), path)
    damage(path, "000.safetensors")
    with pytest.raises(CorruptError, match=r"000\.safetensors"):
        Run.open(path).evaluate()
    with pytest.raises(CorruptError, match=r"000\.safetensors"):
        edits.append(path, THREE)


def test_a_refused_edit_leaves_the_run_as_it_was(tmp_path):
    path = tmp_path / "run"
    fit(settings(), path)
    before, config = files(path), (path / "config.toml").read_text()
    refused = [
        (lambda: edits.append(path, "mlp:21,16,12"), "cell 1"),
        (lambda: edits.append(path, "mlp:20,16;norm=batch"), "expected at least 3"),
        (lambda: edits.append(path, "mlp:20,16,12;act=leaky"), "cell 1"),
        (lambda: edits.append(path), "expected at least 3"),
        (lambda: edits.drop(path, 1), "first"),
        (lambda: edits.drop(path, 3), "1 to 2"),
        (lambda: edits.retrain(path, 0), "1 to 2"),
        (lambda: edits.retrain(path, 2, changes={"lr": -1.0}), "lr"),
    ]
    for edit, said in refused:
        with pytest.raises(InputError, match=said):
            edit()
    assert files(path) == before
    assert (path / "config.toml").read_text() == config
    Run.open(path).evaluate()


def test_baselines_and_unfinished_runs_have_no_cells_to_change(tmp_path):
    fit(settings("bp"), tmp_path / "bp")
    with pytest.raises(InputError, match="whole net"):
        edits.drop(tmp_path / "bp")
    (tmp_path / "bp" / "record.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        edits.drop(tmp_path / "bp")
    with pytest.raises(InputError, match="no run"):
        edits.drop(tmp_path)


@pytest.mark.slow
def test_an_edit_that_was_interrupted_is_resumed_to_the_same_files(tmp_path, monkeypatch):
    fit(settings(net=THREE, epochs=3), tmp_path / "three")
    fit(settings(epochs=3, checkpoint_every=0.0), tmp_path / "run")
    accuracy = Run.open(tmp_path / "run").evaluate().accuracy
    save = RunFolder.save

    def saves_and_dies(folder, *arguments):
        save(folder, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save", saves_and_dies)
        edits.append(tmp_path / "run", THREE)
    assert Run.open(tmp_path / "run").evaluate().accuracy == accuracy
    saved = (tmp_path / "run" / "edit" / "journal.jsonl").read_text()
    told: list[str] = []
    run = edits.append(tmp_path / "run", THREE, callback=Notes(told))
    assert saved
    assert any("resuming" in note for note in told)
    assert not (tmp_path / "run" / "edit").exists()
    assert files(tmp_path / "run") == files(tmp_path / "three")
    assert len(run.record.edits) == 1


class Notes(Callback):
    def __init__(self, told):
        self.told = told

    def note(self, text):
        self.told.append(text)


def test_runs_of_arrays_and_of_own_modules_are_edited_in_python(tmp_path):
    draw = np.random.default_rng(0)
    x, y = draw.random((60, 3, 5), dtype=np.float32), np.arange(60) % 3
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.ReLU()), nn.Linear(8, 6), nn.Linear(6, 4)]
    values = {"epochs": 2, "threads": 1, "device": "cpu"}
    run = edgetrain.fit(modules[:2], (x, y), run_dir=tmp_path / "run", **values)
    whole = edgetrain.fit(modules, (x, y), run_dir=tmp_path / "whole", **values)
    with pytest.raises(InputError, match="your own code"):
        edgetrain.append_cells(run, None, (x, y))
    with pytest.raises(InputError, match="in Python"):
        edgetrain.append_cells(run, modules)
    longer = edgetrain.append_cells(run, modules, (x, y), epochs=2)
    assert files(longer.path) == files(whole.path)
    other = [
        nn.Sequential(nn.Flatten(), nn.Linear(15, 9), nn.ReLU()),
        nn.Linear(9, 6),
        nn.Linear(6, 4),
        nn.Linear(4, 4),
    ]
    with pytest.raises(InputError, match="cell 1"):
        edgetrain.append_cells(longer, other, (x, y))
    assert len(edgetrain.drop_cells(longer, net=modules, data=(x, y)).nodes) == 2


def test_a_whole_run_warns_of_nothing(tmp_path):
    run = fit(settings(), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.evaluate()


def test_the_record_of_an_edited_run_is_whole(tmp_path):
    path = tmp_path / "run"
    fit(settings(), path)
    edits.append(path, THREE)
    record = json.loads((path / "record.json").read_text())
    assert [cell["params"] > 0 for cell in record["cells"]] == [True] * 3
    assert record["peak_gpu_mb"] <= record["predicted_peak_mb"] + 1e-9
    assert (path / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_retraining_on_a_small_disk_leaves_the_cells_before_alone(tmp_path, number):
    net = "mlp:24,60,20,16"
    fit(settings(net=net), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "free")
    before = files(tmp_path / "run")
    free = edits.retrain(tmp_path / "free", number)
    job = open_job(settings(net=net))
    least = plan_job(job).least_disk / (1 << 30)
    finished = size_of(tmp_path / "run") / (1 << 30)  # its files stay until the edit is done
    edits.retrain(tmp_path / "run", number, changes={"max_disk_gb": finished + 1.02 * least})
    with pytest.raises(BudgetError, match="max-disk-gb"):
        edits.retrain(tmp_path / "run", number, changes={"max_disk_gb": finished / 2})
    kept = (tmp_path / "run" / "config.toml").read_text()
    assert "cached = " in kept
    after = files(tmp_path / "run")
    for name in before:
        if name.startswith(tuple(f"00{index}" for index in range(number - 1))):
            assert after[name] == before[name], name
    assert after == files(free.path)


# -- what was asked for, and what was planned ----------------------------------------------------------


ASKED = {
    "nothing": ({}, {"micro_batch": 32, "tiles": 1}),
    "the whole batch": ({"micro_batch": 32}, {"micro_batch": 32, "tiles": 1}),
    "a part of the batch": ({"micro_batch": 8}, {"micro_batch": 8, "tiles": 1}),
    "tiles": ({"tiles": 2}, {"micro_batch": 32, "tiles": 2}),
    "both": ({"micro_batch": 8, "tiles": 4}, {"micro_batch": 8, "tiles": 4}),
    "lists": ({"micro_batch": [8, 16], "tiles": [2, 4]}, {"micro_batch": 16, "tiles": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_retrained_cells_keep_what_was_asked_for_and_plan_the_rest(tmp_path, name, tight):
    values, expected = ASKED[name]
    values = {"net": "mlp:64x2", "batch_size": 32, **values}
    free = plan_job(open_job(settings(**values)))
    least = plan_job(open_job(settings(**values, max_gpu_mb=1e-6))).min_budget
    limit = {"max_gpu_mb": (least + 8) / (1 << 20)} if tight else {}
    fit(settings(**values, **limit), tmp_path / "run")
    for roomy in (2 * free.predicted_peak, 4 * free.predicted_peak):
        run = edits.retrain(tmp_path / "run", 2, changes={"max_gpu_mb": roomy / (1 << 20)})
        found = run.record.cells[1]
        assert {"micro_batch": found.micro_batch, "tiles": found.tiles} == expected


@pytest.mark.slow
def test_sizes_listed_for_other_cells_are_planned_for_a_longer_and_a_shorter_net(tmp_path):
    fit(settings(batch_size=32, micro_batch=[8, 16], tiles=[2, 4]), tmp_path / "run")
    assert [cell.micro_batch for cell in edits.append(tmp_path / "run", THREE).record.cells] == [32, 32, 32]
    assert len(edits.drop(tmp_path / "run", 3).record.cells) == 2


def test_a_placement_that_was_planned_is_planned_anew(tmp_path):
    fit(settings(placement="resident"), tmp_path / "asked")
    assert edits.retrain(tmp_path / "asked", 2).record.placement == "resident"
    fit(settings(placement="stream"), tmp_path / "streamed")
    assert settings_of(tmp_path / "streamed").placement == "stream"


# --- a failed edit leaves the finished run as it was ------------------------------------------------------


def everything(path):
    """The bytes of all files of a run but its lock."""
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file() and file.name != "lock"}


def changed_rows(path, part):
    """The file of rows, with one value changed."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays[part][0, 0] += 1
    np.savez(path, **arrays)


FAILING = {
    "append that diverges": (lambda path: edits.append(path, THREE, {"lr": 1e30}), DivergedError),
    "retrain that diverges": (lambda path: edits.retrain(path, 1, changes={"lr": 1e30}), DivergedError),
    "another net": (lambda path: edits.append(path, "mlp:21,16,12"), InputError),
    "a budget that is too small": (lambda path: edits.retrain(path, 2, changes={"max_gpu_mb": 0.001}), BudgetError),
    "other training rows": (
        lambda path: (changed_rows(path.parent / "rows.npz", "x_train"), edits.drop(path)),
        InputError,
    ),
    "other test rows": (
        lambda path: (changed_rows(path.parent / "rows.npz", "x_test"), edits.retrain(path, 2)),
        InputError,
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failed_edit_leaves_the_finished_run_as_it_was(name, tmp_path):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(90, 6)), np.arange(90) % 3
    np.savez(tmp_path / "rows.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    path = tmp_path / "run"
    fit(settings(data=str(tmp_path / "rows.npz")), path)
    before = everything(path)
    carry_out, error = FAILING[name]
    with pytest.raises(error):
        carry_out(path)
    assert everything(path) == before


@pytest.mark.parametrize("operations", range(9))
def test_a_crash_while_an_edit_is_adopted_is_made_good(operations, tmp_path, monkeypatch):
    path = tmp_path / "run"
    fit(settings(), path)
    fit(settings(net=THREE), tmp_path / "three")
    replace, done = Path.replace, []

    def crashing(source, target):
        if source.is_relative_to(path / "adopted"):
            done.append(target)
            if len(done) > operations:
                raise KeyboardInterrupt
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crashing)
        try:
            edits.append(path, THREE)
        except KeyboardInterrupt:
            assert (path / "adopted").exists()
    run = Run.open(path)
    assert len(run.nodes) == 3
    assert files(path) == files(tmp_path / "three")
    assert run.record.test_accuracy == run.evaluate().accuracy["sum"]
    assert not {"edit", "adopted"} & {member.name for member in path.iterdir()}


def test_a_killed_edit_leaves_a_run_that_every_command_opens(tmp_path):
    path = tmp_path / "run"
    fit(settings(), path)
    before = everything(path)
    with mock.patch.object(Stop, "asked", stopping_after(2)), pytest.raises(Stopped):
        edits.append(path, THREE)
    kept = {file: content for file, content in everything(path).items() if (path / "edit") not in file.parents}
    assert kept == before
    assert fit(settings(), path, resume=True).record.cells[-1].name == "linear 20-16"
