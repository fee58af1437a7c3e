"""A user's own code on the command line: what it prints is not the result, and it is called once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

NET = """
import pathlib
import torch
from torch import nn
print("imported")

class Loud(nn.Linear):
    def forward(self, x):
        print("ran")
        return super().forward(x)

def build():
    print("built")
    with (pathlib.Path(__file__).parent / "calls").open("a") as file:
        file.write("x")
    return [Loud(6, 5), nn.Sequential(nn.Linear(5, 4), nn.ReLU())]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    (made / "net.py").write_text(NET)
    draw = np.random.default_rng(0)
    np.savez(made / "rows.npz", x=draw.normal(size=(60, 6)).astype(np.float32), y=np.arange(60) % 3)
    return made


COMMANDS = {
    "plan": ["plan", "--data", "rows.npz", "--net", "net.py:build"],
    "fit": ["fit", "--data", "rows.npz", "--net", "net.py:build", "--epochs", "1", "--run-dir", "run"],
    "evaluate": ["evaluate", "run", "--net", "net.py:build"],
    "predict": ["predict", "run", "--data", "rows.npz", "--net", "net.py:build"],
    "cells list": ["cells", "run", "list", "--net", "net.py:build"],
    "cells retrain": ["cells", "run", "retrain", "2", "--net", "net.py:build"],
}


@pytest.mark.parametrize("name", list(COMMANDS))  # in this order: later commands need the run
def test_stdout_holds_one_json_value_and_the_function_is_called_once(name: str, folder: Path) -> None:
    (folder / "calls").unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "edgetrain", *COMMANDS[name], "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    json.loads(ran.stdout)
    assert "built" in ran.stderr
    assert (folder / "calls").read_text() == "x"
