"""What a run says of cells that do not learn. ``pytest tests/training/test_diagnostics.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from machine import data, settings
from torch import nn

from edgetrain.training.callbacks import Callback
from edgetrain.training.fit import fit

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")
WAYS = [("separate", "stream"), ("sequence", "stream"), ("sequence", "resident")]


class Heard(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        self.notes.append(text)


def said(path: Path, method: str = "mf", net: Any = None, **values: Any) -> list[str]:
    heard = Heard()
    asked = settings(method, **{"epochs": 3, **values})
    fit(asked, path / "run", net=net, data=data("pixels").set, callback=heard)
    return heard.notes


@pytest.mark.parametrize(("schedule", "placement"), WAYS)
def test_a_run_that_learns_says_nothing(tmp_path: Path, schedule: str, placement: str) -> None:
    assert said(tmp_path, schedule=schedule, placement=placement) == []


@pytest.mark.parametrize(("schedule", "placement"), WAYS)
def test_a_cell_that_does_not_change_is_named_once(tmp_path: Path, schedule: str, placement: str) -> None:
    notes = said(tmp_path, schedule=schedule, placement=placement, lr=1e-30)
    still = [note for note in notes if "did not change in its first epoch" in note]
    assert [note.partition(" (")[0] for note in still] == ["cell 1", "cell 2", "cell 3"]
    assert all("try a larger --lr" in note for note in still)


class Dead(nn.Module):
    """Units that none of the inputs reaches."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.constant_(self.linear.bias, -1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


@pytest.mark.parametrize(("schedule", "placement"), WAYS)
def test_a_dead_cell_is_named_once(tmp_path: Path, schedule: str, placement: str) -> None:
    net = [nn.Sequential(nn.Linear(21, 12), nn.ReLU()), Dead(12, 10), nn.Sequential(nn.Linear(10, 9), nn.ReLU())]
    notes = said(tmp_path, net=net, schedule=schedule, placement=placement)
    dead = [note for note in notes if "only zeros" in note]
    assert len(dead) == 1
    assert dead[0].startswith("cell 2 (")
    assert "try a smaller --lr, another --seed" in dead[0]


def test_a_loss_that_does_not_fall_is_told_with_its_figures(tmp_path: Path) -> None:
    notes = [note for note in said(tmp_path, lr=40.0) if "did not lower its loss" in note]
    assert notes
    assert "in its first epoch" in notes[0]
    assert "try a smaller --lr" in notes[0]


def test_rules_that_play_against_themselves_need_not_lower_a_loss(tmp_path: Path) -> None:
    notes = said(tmp_path, "lbp-gan", lr=40.0, classifier_lr=1e-3)
    assert [note for note in notes if "did not lower its loss" in note and "classifier" not in note] == []
