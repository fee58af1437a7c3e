"""Accuracy in the course of training, and runs that it ends: ``pytest tests/training/test_evaluations.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machine import assert_same, stopped_after, units

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.errors import InputError
from edgetrain.record import Evaluation
from edgetrain.report import figures
from edgetrain.store.run import RunFolder
from edgetrain.training.evaluations import Evaluations
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.units import to_mb

ROWS, CLASSES = 90, 3
FAST: dict[str, Any] = {"net": "mlp:14,12", "batch_size": 16, "threads": 1, "device": "cpu", "lr": 3e-3, "epochs": 6}
#: Method, schedule, and the cells whose own accuracy is kept.
WAYS: list[tuple[str, dict[str, Any], list[bool]]] = [
    ("mf", {"schedule": "separate"}, [True, True]),
    ("mf", {"schedule": "sequence"}, [True, True]),
    ("sll", {"schedule": "sequence"}, [True, True]),
    ("lbp-ae", {"schedule": "sequence"}, [False, False]),
    ("bp", {}, [True]),
    ("bp-stream", {}, [False, True]),
]
EVERY_WAY = pytest.mark.parametrize(
    ("method", "how", "alone"), WAYS, ids=[f"{name}-{how.get('schedule', '')}" for name, how, _ in WAYS]
)


def data(test: bool = True) -> DataSet:
    """Classes that overlap, so that accuracy rises and falls."""
    draw = np.random.default_rng(2)
    y = np.arange(ROWS + 30) % CLASSES
    x = (draw.normal(size=(CLASSES, 8))[y] * 0.7 + draw.normal(size=(len(y), 8))).astype(np.float32)
    return from_arrays((x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]) if test else None)


def asked(method: str, **values: Any) -> Settings:
    return Settings().with_values({"method": method, **FAST, **values})


@EVERY_WAY
def test_the_accuracies_are_those_of_runs_that_end_there(
    method: str, how: dict[str, Any], alone: list[bool], tmp_path: Path
) -> None:
    run = fit(asked(method, evaluate_every=2, **how), tmp_path / "run", data=data())
    found = [cell.evaluations for cell in run.record.cells]
    assert [[each.epoch for each in cell] for cell in found] == [[2, 4, 6]] * len(found)
    assert [all(each.accuracy is not None for each in cell) for cell in found] == alone
    assert run.record.evaluated == "test"
    for number, epochs in enumerate((2, 4, 6)):
        shorter = fit(asked(method, epochs=epochs, **how), tmp_path / str(epochs), data=data()).record
        first = slice(1) if how.get("schedule") == "separate" else slice(None)  # later ones read other latents
        own = [cell.evaluations[number].accuracy for cell in run.record.cells][first]
        assert own == shorter.votes["cells"][first]
        if how.get("schedule") != "separate":
            assert found[-1][number].net_accuracy == shorter.test_accuracy
    assert found[-1][-1].net_accuracy == run.record.test_accuracy
    assert run.record.peak_gpu_mb == run.record.predicted_peak_mb


@EVERY_WAY
def test_evaluating_changes_no_bit_and_keeps_the_promised_disk(
    method: str, how: dict[str, Any], alone: list[bool], tmp_path: Path
) -> None:
    given = asked(method, evaluate_every=1, validation=0.2, **how)
    run = fit(given, tmp_path / "run", data=data())
    assert run.record.evaluated == "validation"
    plain = fit(asked(method, validation=0.2, **how), tmp_path / "plain", data=data())
    assert_same(units(run.path), units(plain.path))
    assert run.record.disk_mb is not None
    assert run.record.disk_mb <= (to_mb(plan_job(open_job(given, data=data())).disk_bytes) or 0)


def made(accuracies: list[float]) -> Any:
    """Stands for evaluations that find these accuracies, one after the other, for every cell anew."""

    def evaluate(self: Evaluations, visit: Any) -> None:
        alone = self.work.schedule == "separate"
        for record in [self.records[visit.node]] if alone else self.records:
            record.evaluations.append(Evaluation(visit.epoch + 1, *[accuracies[visit.epoch]] * 2))

    return evaluate


@EVERY_WAY
def test_a_cell_or_run_ends_when_its_accuracy_rises_no_more(
    method: str, how: dict[str, Any], alone: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluations, "evaluate", made([0.5, 0.7, 0.7, 0.6, 0.9, 0.9]))
    given = asked(method, patience=2, validation=0.2, **how)
    run = fit(given, tmp_path / "run", data=data())
    whole_net = method == "bp-stream"
    assert [cell.epochs for cell in run.record.cells][-1 if whole_net else 0 :] == [4] * (
        1 if whole_net else len(alone)
    )
    four = fit(asked(method, epochs=4, validation=0.2, **how), tmp_path / "four", data=data())
    assert_same(units(run.path), units(four.path))
    again = fit(given, tmp_path / "run", data=data(), resume=True)
    assert again.record.cells[-1].epochs == 4
    assert run.record.latents_mb == four.record.latents_mb


@pytest.mark.parametrize("questions", [3, 9, 21, 33])
@EVERY_WAY
def test_a_run_that_was_stopped_ends_at_the_same_epoch(
    method: str, how: dict[str, Any], alone: list[bool], questions: int, tmp_path: Path
) -> None:
    given = asked(method, patience=1, validation=0.2, checkpoint_every=0.0, epochs=8, **how)
    whole = fit(given, tmp_path / "whole", data=data())
    steps = sum(cell.epochs for cell in whole.record.visits) * 5
    stopped_after(min(questions, steps), given, tmp_path / "cut", data())
    found = fit(given, tmp_path / "cut", data=data(), resume=True)
    assert_same(units(found.path), units(whole.path))
    assert [cell.evaluations for cell in found.record.visits] == [cell.evaluations for cell in whole.record.visits]
    assert [cell.epochs for cell in found.record.visits] == [cell.epochs for cell in whole.record.visits]


def test_patience_is_one_evaluation_after_the_best_not_after_the_last(tmp_path: Path) -> None:
    run = fit(asked("mf", patience=3, evaluate_every=2, validation=0.2, epochs=30), tmp_path / "run", data=data())
    for cell in run.record.cells:
        seen = [each.accuracy for each in cell.evaluations]
        best = seen.index(max(seen))  # type: ignore[type-var]
        assert len(seen) == min(best + 4, 15)
        assert cell.epochs == 2 * len(seen)
    assert any(cell.epochs < 30 for cell in run.record.cells)


def test_the_report_draws_the_accuracies(tmp_path: Path) -> None:
    runs = [
        fit(asked(method, evaluate_every=1, **how), tmp_path / str(number), data=data()).record
        for number, (method, how, _) in enumerate(WAYS)
    ]
    for shown in ([("one", runs[0])], [("one", runs[1])], [(str(number), run) for number, run in enumerate(runs)]):
        names = [drawing.name for drawing in figures.of_runs(shown)]
        assert "evaluations" in names
    plain = fit(asked("mf", epochs=1), tmp_path / "plain", data=data()).record
    assert "evaluations" not in [drawing.name for drawing in figures.of_runs([("plain", plain)])]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 2}, "--patience needs --validation"),
        ({"patience": 0, "validation": 0.2}, "at least 1"),
        ({"evaluate_every": 0}, "at least 1"),
        (
            {"patience": 2, "validation": 0.2, "method": "lbp-ae", "schedule": "separate"},
            "make no predictions of their own",
        ),
        ({"evaluate_every": 1, "placement": "resident"}, "--placement resident"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fit(asked("mf").with_values(values), tmp_path / "run", data=data())
    assert not (tmp_path / "run").exists()


def test_rows_to_evaluate_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no test rows; hold some out"):
        fit(asked("mf", evaluate_every=1), tmp_path / "run", data=data(test=False))
    run = fit(asked("mf", evaluate_every=1, validation=0.2), tmp_path / "run", data=data(test=False))
    assert run.record.evaluated == "validation"
    assert RunFolder(run.path).is_finished()


def test_patience_needs_room_for_all_latents() -> None:
    given = {"validation": 0.2, "net": "mlp:64x4", "schedule": "separate"}
    whole = plan_job(open_job(asked("mf", patience=1, **given), data=data()))
    tight = {**given, "max_disk_gb": (whole.disk_bytes - 4_000) / (1 << 30)}
    assert plan_job(open_job(asked("mf", evaluate_every=1, **tight), data=data())).cut.cached is not None
    with pytest.raises(InputError, match="--patience needs the latents"):
        plan_job(open_job(asked("mf", patience=1, **tight), data=data()))
