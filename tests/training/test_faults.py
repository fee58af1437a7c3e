"""A run whose disk fails at every single operation. ``pytest tests/training/test_faults.py``; figures with ``-s``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import MODES, Crash, Faults, points
from machine import units
from tiers import examples, sampled

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.errors import CorruptError, EdgetrainError
from edgetrain.store.entries import Checkpoint
from edgetrain.store.run import RunFolder
from edgetrain.training.checkpointing import Checkpoints
from edgetrain.training.fit import fit

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")
SCHEDULES = ("separate", "sequence")


def data() -> DataSet:
    draw = np.random.default_rng(3)
    x, y = draw.normal(size=(20, 6)).astype(np.float32), np.arange(20) % 2
    return from_arrays((x[:16], y[:16]), (x[16:], y[16:]))


def asked(schedule: str) -> Settings:
    return Settings().with_values(
        {
            "method": "mf", "net": "mlp:5,4", "epochs": 2, "batch_size": 8, "schedule": schedule, "threads": 1,
            "device": "cpu", "placement": "stream", "prefetch": 0,
        }
    )  # fmt: skip


@pytest.fixture
def some_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are due three questions after the last, so that they fall between visits and within them."""

    def due(self: Checkpoints, share: float) -> bool:
        questions = vars(self).setdefault("questions", {})
        questions[self._number] = questions.get(self._number, 0) + 1
        return bool(questions[self._number] >= 3)

    monkeypatch.setattr(Checkpoints, "due", due)


@pytest.mark.counted
@pytest.mark.usefixtures("some_checkpoints")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_a_fault_at_any_point_the_run_goes_on_to_the_same_bits(
    schedule: str, mode: str, tmp_path: Path, figures: Callable[[str], None]
) -> None:
    outcomes = tried(schedule, mode, tmp_path)
    figures(f"{schedule}, {mode}: {dict(outcomes)}")
    assert set(outcomes) <= {"same bits", "finished all the same"}
    assert sum(outcomes.values()) >= (1 if mode in ("short", "torn") else 10) * min(10, examples(1))


def tried(schedule: str, mode: str, folder: Path) -> Counter[str]:
    """What became of a run and its resumption, for a fault at every point."""
    whole = folder / "whole" / "run"
    whole.parent.mkdir()
    with Faults(whole).injected() as seen:
        fit(asked(schedule), whole, data=data())
    expected = outcome_of(whole)
    entries = list(RunFolder(whole).journal.entries())
    saved = [entry for entry in entries if isinstance(entry, Checkpoint)]
    assert any(entry.within for entry in saved)
    assert any(entry.latents for entry in saved) == (schedule == "sequence")
    found: Counter[str] = Counter()
    for number, at in enumerate(sampled(points(seen.seen, mode), 10)):
        path = folder / f"{number}" / "run"
        path.parent.mkdir()
        found[after(Faults(path, at, mode), schedule, expected)] += 1
    return found


def after(faults: Faults, schedule: str, expected: dict[str, Any]) -> str:
    path, where = faults.root, "finished all the same"
    try:
        with faults.injected():
            fit(asked(schedule), path, data=data())
    except Crash:
        where = "same bits"
    except EdgetrainError as error:
        assert str(path) in str(error), error
        assert "\n" not in str(error)
        where = "same bits"
    try:
        fit(asked(schedule), path, data=data(), resume=True)
    except CorruptError as error:
        assert str(path) in str(error), error
        return "refused"
    assert_same(outcome_of(path), expected)
    return where


def outcome_of(path: Path) -> dict[str, Any]:
    return {**units(path), "model": (path / "model.safetensors").read_bytes()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found["model"] == expected["model"]
    for name, value in expected.items():
        assert name == "model" or torch.equal(found[name], value), name
