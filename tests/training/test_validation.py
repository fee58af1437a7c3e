"""Validation rows: how they are drawn, and what is chosen by them. ``pytest tests/training/test_validation.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine import assert_same, stopped_after, units

import edgetrain
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.data.validation import with_validation
from edgetrain.errors import InputError
from edgetrain.training.edits import retrain
from edgetrain.training.fit import fit
from edgetrain.training.run import Run

ROWS, CLASSES = 120, 3
FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu", "net": "mlp:12x2"}


def rows(count: int = ROWS, shift: int = 0) -> tuple[Any, Any]:
    draw = np.random.default_rng(2 + shift)
    y = draw.integers(0, CLASSES, count)
    y[:CLASSES] = np.arange(CLASSES)
    return (draw.normal(size=(count, 6)) + 1.2 * y[:, None]).astype(np.float32), y


def table() -> DataSet:
    return from_arrays(rows(), rows(40, 1))


def asked(**values: Any) -> Settings:
    return Settings().with_values({**FAST, "validation": 0.2, **values})


def of(part: Any) -> tuple[Any, Any]:
    x, y = zip(*part.chunks(), strict=True)
    return np.concatenate(x), np.concatenate(y)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=200), st.floats(0.15, 0.8))
def test_the_split_is_stratified_and_loses_no_row(labels: list[int], share: float) -> None:
    y = np.array([0, 0, 1, 1, *labels]) % 2
    x = np.arange(len(y), dtype=np.float32)[:, None]
    try:
        data = with_validation(from_arrays((x, y)), share)
    except InputError as error:
        assert "would be a validation row" in str(error)
        return
    train, held_out = of(data.train), of(data.validation)
    assert sorted([*train[0][:, 0], *held_out[0][:, 0]]) == list(range(len(y)))
    assert (len(train[1]), len(held_out[1])) == (data.train.rows, data.validation.rows)
    for label in range(2):
        assert np.array_equal(y[train[0][:, 0].astype(int)], train[1])
        assert (held_out[1] == label).sum() == pytest.approx(share * (y == label).sum(), abs=1.01)
        assert (train[1] == label).any()
    again = with_validation(from_arrays((x, y)), share)
    assert np.array_equal(of(again.validation)[0], held_out[0])


def test_a_run_trains_on_the_other_rows_alone(tmp_path: Path) -> None:
    run = fit(asked(), tmp_path / "run", data=table())
    split = with_validation(table(), 0.2)
    alone = fit(asked(validation=None), tmp_path / "alone", data=replace(split, validation=None))
    assert_same(units(run.path), units(alone.path))
    assert run.record.rows == split.train.rows == 96
    assert run.record.validation_votes == run.evaluate(of(split.validation)).accuracy
    assert run.record.votes == alone.record.votes
    assert run.record.vote == alone.record.vote == "sum"
    assert alone.record.validation_votes == {}


@pytest.mark.parametrize("schedule", ["separate", "sequence"])
@pytest.mark.parametrize("method", ["mf", "sll"])
def test_the_vote_with_the_best_validation_accuracy_predicts(method: str, schedule: str, tmp_path: Path) -> None:
    run = fit(asked(method=method, vote="auto", schedule=schedule, lr=0.02), tmp_path / "run", data=table())
    votes = run.record.validation_votes
    assert votes[run.vote] == max(votes.values())
    assert run.record.test_accuracy == run.record.votes[run.vote]
    x, _ = rows(30, 5)
    assert np.allclose(run.model()(torch.from_numpy(x)).detach().numpy(), run.scores(x), atol=1e-5)
    again = Run.open(run.path)
    assert again.vote == run.vote
    assert np.array_equal(again.predict(x), run.predict(x))


def test_another_vote_than_the_method_s_is_chosen_and_shipped(tmp_path: Path, monkeypatch: Any) -> None:
    from edgetrain.training.predictor import Predictor

    real = Predictor.run

    def turned(self: Any, *arguments: Any, **named: Any) -> Any:
        found = real(self, *arguments, **named)
        if len(found.scores["sum"]) == 24:  # the validation rows
            found.accuracy |= {"sum": 0.1, "last": 0.9}
        return found

    monkeypatch.setattr(Predictor, "run", turned)
    run = fit(asked(vote="auto"), tmp_path / "run", data=table())
    monkeypatch.setattr(Predictor, "run", real)
    assert run.vote == "last"
    x, _ = rows(30, 5)
    found = Run.open(run.path)
    assert np.array_equal(found.predict(x), found.evaluate((x, np.zeros(30, int))).scores["last"].argmax(1))
    assert np.allclose(found.model()(torch.from_numpy(x)).detach().numpy(), found.scores(x), atol=1e-5)


def test_of_equal_votes_the_method_s_own_is_kept(tmp_path: Path) -> None:
    for method, own in (("mf", "sum"), ("sll", "last")):  # of one cell, both votes are the same
        run = fit(asked(method=method, vote="auto", net="mlp:12"), tmp_path / method, data=table())
        assert len(set(run.record.validation_votes.values())) == 1
        assert run.vote == own


@pytest.mark.parametrize("schedule", ["separate", "sequence"])
def test_a_run_with_validation_rows_resumes_and_is_edited(schedule: str, tmp_path: Path) -> None:
    settings = asked(schedule=schedule, checkpoint_every=0.0, vote="auto")
    whole = fit(settings, tmp_path / "whole", data=table())
    stopped_after(6, settings, tmp_path / "cut", table())
    cut = fit(settings, tmp_path / "cut", data=table(), resume=True)
    assert_same(units(cut.path), units(whole.path))
    assert cut.record.validation_votes == whole.record.validation_votes
    edited = retrain(cut.path, 2, data=table())
    assert edited.record.rows == 96
    assert edited.record.validation_votes


def test_rows_of_a_file_that_draws_its_test_rows_stay_apart(tmp_path: Path) -> None:
    x, y = rows(200)
    np.savez(tmp_path / "all.npz", x=x, y=y)
    run = edgetrain.fit(FAST["net"], str(tmp_path / "all.npz"), run_dir=tmp_path / "run", validation=0.25,
                        **{key: value for key, value in FAST.items() if key != "net"})  # fmt: skip
    assert run.record.rows == 120  # 40 test rows, 40 validation rows
    found = run.evaluate(str(tmp_path / "all.npz"))
    assert found.rows == 40
    assert found.accuracy == run.evaluate().accuracy


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"validation": None, "vote": "auto"}, "--vote auto needs --validation"),
        ({"validation": 0.004}, "none of the .* training rows of class 0 would be a validation row"),
        ({"validation": 1.0}, "--validation is 1.0; expected a share"),
        ({"validation": 0.0}, "--validation is 0.0; expected a share"),
        ({"vote": "sum"}, "--vote is 'sum'; expected auto"),
    ],
)
def test_what_cannot_be_held_out_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        fit(asked(**values), tmp_path / "run", data=table())
    assert not (tmp_path / "run").exists()
