"""Rules that edgetrain does not know: from a file, as a class, from an installed package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from machine import assert_same, data, units

import edgetrain
from edgetrain.errors import InputError
from edgetrain.nets.spec import NETS
from edgetrain.plugins import Registry
from edgetrain.store.entries import MethodFingerprint
from edgetrain.training.methods import METHODS, fingerprint
from edgetrain.training.run import Run

HINGE = '''
"""A rule of somebody else's: a hinge loss on a learned projection of the cell's outputs."""

from torch import nn
from torch.nn.functional import multi_margin_loss

from edgetrain.objectives.base import Defaults, Step
from edgetrain.objectives.statistic import StatisticObjective


class Hinge(StatisticObjective):
    name = "hinge"
    defaults = Defaults(schedule="separate", optimizer="adam", lr=3e-3)
    vote = "sum"
    tile_axes = {"weight": 1}

    def head(self, node):
        return nn.Linear(self.width(node.shape), self.classes, bias=False)

    def statistic(self, cell, head, streams, units=None):
        a = cell(streams["x"])
        return head(self.vector(a)), {"x": a}

    def loss_from(self, statistic, head, batch):
        return Step(multi_margin_loss(statistic, batch.y, reduction="sum"), None, statistic.detach())

    def scores_from(self, statistic):
        return statistic
'''
TWO_PHASES = '''
"""Two phases: a prediction, and a decoder that learns to reconstruct from what the cell has become."""

from torch import nn
from torch.nn.functional import cross_entropy

from edgetrain.objectives.base import Defaults, Objective, Phase, Step


class Twofold(Objective):
    name = "twofold"
    citation = "Nobody: Nowhere, never."
    defaults = Defaults(schedule="sequence", optimizer="adamw", lr=3e-3)
    vote = "last"
    phases = (
        Phase("predict", lambda name: "decoder" not in name),
        Phase("reconstruct", lambda name: "decoder" in name),
    )

    def head(self, node):
        inputs = 1
        for side in node.parent.shape:
            inputs *= side
        width = self.width(node.shape)
        return nn.ModuleDict({"predict": nn.Linear(width, self.classes), "decoder": nn.Linear(width, inputs)})

    def loss(self, phase, cell, head, batch):
        a = cell(batch.streams["x"])
        if phase == "reconstruct":
            made = head["decoder"](self.vector(a).detach())
            return Step((made - batch.streams["x"].flatten(1)).square().sum())
        logits = head["predict"](self.vector(a))
        return Step(cross_entropy(logits, batch.y, reduction="sum"), {"x": a.detach()}, logits.detach())

    def score(self, head, latents):
        return head["predict"](self.vector(latents["x"]))
'''
RULES = {"hinge.py:Hinge": HINGE, "twofold.py:Twofold": TWO_PHASES}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for spec, text in RULES.items():
        (tmp_path / spec.partition(":")[0]).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edgetrain_in(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return commands.run(arguments, folder, {**os.environ, "OMP_NUM_THREADS": "1", **environment})


FIT = ("fit", "--data", "digits", "--net", "mlp:48x2", "--epochs", "6", "--threads", "1", "--device", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("method", RULES)
def test_a_rule_in_a_file_is_trained_planned_evaluated_predicted_and_reported(folder: Path, method: str) -> None:
    asked = (*FIT, "--method", method, "--max-gpu-mb", "0.2")
    planned = edgetrain_in(folder, "plan", *asked[1:], "--json")
    assert json.loads(planned.stdout)["fits"], planned.stderr
    trained = edgetrain_in(folder, *asked, "--run-dir", "r", "--json")
    assert trained.returncode == 0, trained.stderr
    record = json.loads(trained.stdout)
    assert record["method"] == method.rpartition(":")[2].lower()
    assert record["test_accuracy"] > 0.6  # 0.1 by chance
    assert record["peak_gpu_mb"] <= 0.2
    own = ("--method", method)
    for command in (("evaluate", "r"), ("predict", "r", "--data", "digits"), ("cells", "r", "list")):
        assert edgetrain_in(folder, *command, *own, "--json").returncode == 0
        forgotten = edgetrain_in(folder, *command, "--json")
        assert forgotten.returncode == 2
        assert forgotten.stderr.count("\n") == 1
        assert f"name it again: --method {method}" in forgotten.stderr
    accuracy = json.loads(edgetrain_in(folder, "evaluate", "r", *own, "--json").stdout)["test_accuracy"]
    assert accuracy == record["test_accuracy"]
    assert edgetrain_in(folder, "report", "r").returncode == 0  # needs no code
    assert "<html" in (folder / "r" / "report.html").read_text()
    if method.startswith("hinge"):
        assert edgetrain_in(folder, "cells", "r", "retrain", "2", *own, "--quiet").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", RULES)
def test_a_rule_in_a_file_that_was_killed_is_resumed_to_the_same_bits(folder: Path, method: str) -> None:
    asked = (*FIT, "--method", method, "--checkpoint-every", "0", "--epochs", "12")
    whole = edgetrain_in(folder, *asked, "--run-dir", "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "edgetrain", *asked, "--run-dir", "cut"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        journal, waited = folder / "cut" / "journal.jsonl", time.monotonic() + 120
        while time.monotonic() < waited and not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    forgotten = edgetrain_in(folder, "fit", "--resume", "--run-dir", "cut")
    assert forgotten.returncode == 2
    assert f"name it again: --method {method}" in forgotten.stderr
    resumed = edgetrain_in(folder, "fit", "--resume", "--run-dir", "cut", "--method", method)
    assert resumed.returncode == 0, resumed.stderr
    assert_same(units(folder / "cut"), units(folder / "whole"))


def test_a_rule_in_tiles_is_the_rule(folder: Path) -> None:
    steps = {"epochs": 1, "batch_size": 100, "optimizer": "sgd", "lr": 0.05, "threads": 1, "device": "cpu"}
    whole, tiled = (
        edgetrain.fit("mlp:70,33", "digits", "hinge.py:Hinge", run_dir=folder / name, **steps, **more)
        for name, more in (("whole", {}), ("tiled", {"tiles": 3}))
    )
    assert [cell.tiles for cell in tiled.record.cells] == [3, 3]
    for name, value in units(whole.path).items():
        torch.testing.assert_close(units(tiled.path)[name], value, rtol=1e-5, atol=1e-6)


def test_a_class_in_python_is_a_method(folder: Path) -> None:
    from edgetrain.objectives.mf import MonoForward

    class Mine(MonoForward):
        name = "mine"

    rows = data("pixels")
    given = {"epochs": 1, "threads": 1, "device": "cpu", "net": "mlp:23x2", "data": (rows.raw, rows.labels)}
    run = edgetrain.fit(method=Mine, run_dir=folder / "r", **given)  # type: ignore[arg-type]
    assert run.record.method == "mine"
    with pytest.raises(InputError, match="name it again: method=MyRule in Python"):
        edgetrain.open_run(folder / "r")
    again = edgetrain.open_run(folder / "r", method=Mine)
    assert np.array_equal(again.scores(rows.raw), run.scores(rows.raw))
    resumed = edgetrain.fit(method=Mine, run_dir=folder / "r", resume=True, **given)  # type: ignore[arg-type]
    assert resumed.record == run.record
    assert edgetrain.retrain_cells(run, 2, data=(rows.raw, rows.labels)).record.method == "mine"


def test_another_rule_than_the_run_s_is_refused_and_another_comment_is_not(folder: Path) -> None:
    edgetrain.fit("mlp:16", "digits", "hinge.py:Hinge", run_dir=folder / "r", epochs=1, device="cpu", threads=1)
    file = folder / "hinge.py"
    file.write_text(HINGE.replace("    def head", "    # what it learns with\n    def head"))
    assert Run.open(folder / "r", method="hinge.py:Hinge").nodes
    file.write_text(HINGE.replace("bias=False", "bias=True"))
    with pytest.raises(InputError, match="its code differs"):
        Run.open(folder / "r", method="hinge.py:Hinge")
    with pytest.raises(InputError, match="was trained with 'mf'"):
        edgetrain.fit("mlp:16", "digits", run_dir=folder / "mf", epochs=1, device="cpu", threads=1)
        Run.open(folder / "mf", method="hinge.py:Hinge")


MF = "from edgetrain.objectives.mf import MonoForward\nclass Mine(MonoForward):\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no 'Mine'"),
        ("Mine = 3", "is not a class derived from"),
        ("1 / 0", "fails on import: ZeroDivisionError"),
        ("def Mine(): ...", "is not a class derived from"),
        ("from edgetrain.objectives.base import Objective\nclass Mine(Objective): ...", "does not define loss"),
        (MF + "    name = ''", "expected a text"),
        (
            MF + "    vote = 'all'",
            "vote is 'all'",
        ),
        (
            MF + "    defaults = 3",
            "defaults is missing",
        ),
    ],
)
def test_what_is_no_rule_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    found = edgetrain_in(tmp_path, *FIT, "--method", "mine.py:Mine", "--run-dir", "r")
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert said in found.stderr
    assert not (tmp_path / "r").exists()


def test_a_file_that_is_not_there_and_a_name_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    for method, said in (("nowhere.py:Mine", "no file nowhere.py"), ("mff", "did you mean 'mf'")):
        found = edgetrain_in(tmp_path, *FIT, "--method", method, "--run-dir", "r")
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)
        assert said in found.stderr


# -- installed packages --------------------------------------------------------------------------------

PLUGIN = """
import numpy as np

from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.nets import mlp
from edgetrain.nets.spec import Family
from edgetrain.objectives.mf import MonoForward


class Borrowed(MonoForward):
    name = "borrowed"


def cells(text, in_shape, options):
    return mlp.cells(f"{text}x2", in_shape, options)


twice = Family(cells, "twice:20")


def rows():
    draw = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (draw.random((60, 5)) + y[:, None]).astype("float32")
    return from_arrays((x[:45], y[:45]), (x[45:], y[45:]), reading=Reading("table"))
"""
POINTS = """
[edgetrain.objectives]
borrowed = strange_package:Borrowed
broken = strange_package:NotThere

[edgetrain.nets]
twice = strange_package:twice

[edgetrain.datasets]
stripes = strange_package:rows
"""


@pytest.mark.slow
def test_an_installed_package_provides_a_method_a_net_and_a_data_set(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "strange_package-1.0.dist-info").mkdir(parents=True)
    (site / "strange_package.py").write_text(PLUGIN)
    about = site / "strange_package-1.0.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    there = {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    asked = ("--data", "stripes", "--net", "twice:20", "--method", "borrowed", "--epochs", "30", "--device", "cpu")
    trained = edgetrain_in(tmp_path, "fit", *asked, "--batch-size", "10", "--run-dir", "r", "--json", **there)
    assert trained.returncode == 0, trained.stderr
    record = json.loads(trained.stdout)
    assert (record["method"], len(record["cells"])) == ("borrowed", 2)
    assert edgetrain_in(tmp_path, "evaluate", "r", **there).returncode == 0
    resumed = edgetrain_in(tmp_path, "fit", "--resume", "--run-dir", "r", **there)
    assert resumed.returncode == 0, resumed.stderr
    broken = edgetrain_in(tmp_path, "fit", *FIT[1:], "--method", "broken", **there)
    assert broken.returncode == 2
    assert "'broken' of the installed package strange-package" in broken.stderr
    assert edgetrain_in(tmp_path, *FIT, "--run-dir", "q", **there).returncode == 0  # others go on working
    gone = edgetrain_in(tmp_path, "evaluate", "r")
    assert gone.returncode == 2
    assert "unknown method 'borrowed'" in gone.stderr


def test_our_own_names_win(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, dist, value = "mf", None, "strange:Mf"

        def load(self) -> Any:
            raise AssertionError("nobody asked for it")

    monkeypatch.setattr("edgetrain.plugins.entry_points", lambda group: [Point()])
    assert METHODS["mf"].name == "mf"
    assert list(METHODS).count("mf") == 1
    assert isinstance(METHODS, Registry)
    assert NETS["mlp"].example == "mlp:1000x2"


def test_fingerprints_see_code_and_not_comments() -> None:
    assert fingerprint(METHODS["mf"]) == MethodFingerprint("mf", "")  # ours is known by its name
