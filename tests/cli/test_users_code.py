"""A user's own code on the command line: what it prints is not the result, and it is called once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import commands
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


COMMANDS = (  # in this order: later ones need the run
    "plan --data rows.npz",
    "fit --data rows.npz --epochs 1 --run-dir run",
    "evaluate run",
    "predict run --data rows.npz",
    "cells run list",
    "cells run retrain 2",
)


@pytest.mark.slow
def test_stdout_holds_one_json_value_and_the_function_is_called_once(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", x=draw.normal(size=(60, 6)).astype(np.float32), y=np.arange(60) % 3)
    for command in COMMANDS:
        (tmp_path / "calls").unlink(missing_ok=True)
        ran = commands.run((*command.split(), "--net", "net.py:build", "--json"), tmp_path, dict(os.environ))
        assert ran.returncode == 0, ran.stderr
        json.loads(ran.stdout)
        assert "built" in ran.stderr
        assert (tmp_path / "calls").read_text() == "x"
