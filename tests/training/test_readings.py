"""Runs remember how their rows were read, and read new rows the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import stopped_after
from torch import nn

import edgetrain
from edgetrain.config import resolve
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.errors import InputError
from edgetrain.training.run import Run

ROWS = 120
Y = np.arange(ROWS) % 2


def fitted(path: Path, inputs: np.ndarray, net: Any = "mlp:16x2", **values: Any) -> edgetrain.Run:
    train, test = ((inputs[part], Y[part]) for part in (slice(100), slice(100, None)))
    settings = {"epochs": 12, "batch_size": 20, "device": "cpu", **values}
    return edgetrain.fit(net, (train, test), run_dir=path / "run", **settings)


def tokens(dtype: str = "int64") -> np.ndarray:
    """Ids 1 to 8; each class has words of its own."""
    draw = np.random.default_rng(0)
    return (draw.integers(0, 4, (ROWS, 6)) * 2 + Y[:, None] + 1).astype(dtype)


def signals() -> np.ndarray:
    """[N, L, C]: class 1 has a higher pitch, on values far from 0."""
    time = np.arange(32)
    phase = np.random.default_rng(0).random((ROWS, 1))
    wave = np.sin(time * (0.4 + 0.8 * Y[:, None]) + 6 * phase)
    return np.stack([1e6 + 1e-3 * wave, -wave], 2)


def test_bytes_of_a_table_are_standardised(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    inputs = (100 + draw.integers(0, 2, (ROWS, 5)) + 4 * (np.arange(5) == 2) * Y[:, None]).astype(np.uint8)
    run = fitted(tmp_path, inputs, lr=0.02, epochs=40)
    assert run.record.test_accuracy >= 0.95
    assert run.record.input == "100 rows of a table, 5 columns, each standardised"
    assert np.array_equal(run.predict(inputs), run.predict(inputs.astype(np.float64)))


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
@pytest.mark.parametrize("net", ["mlp:16x2", [nn.Embedding(9, 8), nn.Flatten(), nn.Linear(48, 8)]])
def test_token_ids_of_the_user_s_own(tmp_path: Path, net: Any, dtype: str) -> None:
    run = fitted(tmp_path, tokens(dtype), net, input="tokens", lr=0.01)
    assert run.record.test_accuracy == 1
    assert run.record.input == "100 rows of 6 token ids, 0..8"
    opened = edgetrain.open_run(run.path, None if isinstance(net, str) else net)
    assert (opened.predict(tokens()) == Y).all()
    assert opened.evaluate((tokens()[:50], Y[:50])).accuracy["sum"] == 1
    with pytest.raises(InputError, match="inputs: row 3 holds id 9 at position 1, expected 0..8"):
        opened.predict(np.where((np.arange(ROWS) == 3)[:, None] & (np.arange(6) == 1), 9, tokens()))
    with pytest.raises(InputError, match="float64 values, expected integers"):
        opened.predict(tokens().astype(float))


@pytest.mark.parametrize("embedding", [nn.Embedding(9, 8), nn.EmbeddingBag(9, 8)])
def test_an_embedding_of_what_are_not_token_ids_is_refused(tmp_path: Path, embedding: nn.Module) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = embedding

        def forward(self, x: Any) -> Any:
            return self.words(x.long())

    for net in ([embedding, nn.Flatten()], [Words()], [nn.Sequential(nn.Identity(), Words())]):
        with pytest.raises(InputError, match="takes token ids, but .*; state --input tokens"):
            fitted(tmp_path, tokens(), net)
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_of_positions_is_no_matter_of_the_rows(tmp_path: Path) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.linear = nn.Embedding(6, 1), nn.Linear(6, 8)

        def forward(self, x: Any) -> Any:
            return self.linear(x + self.positions.weight[:, 0])

    assert fitted(tmp_path, tokens(), [Positions()], epochs=1).record.test_accuracy is not None


@pytest.mark.parametrize("method", ["mf", "bp", "lbp-ae", "ff"])
def test_signals(tmp_path: Path, method: str) -> None:
    run = fitted(tmp_path, signals(), method=method, input="signal", channels="last")
    way = "scaled to 0..1" if method == "lbp-ae" else "standardised"
    assert run.record.input == f"100 signals, 2x32, each channel {way}, channels last"
    assert run.shape.shape == (2, 32)
    assert np.array_equal(run.predict(signals()[:7]), run.predict(signals())[:7])
    with pytest.raises(InputError, match="was trained on"):
        run.predict(signals().transpose(0, 2, 1))


def test_signals_through_convolutions_of_the_user_s_own(tmp_path: Path) -> None:
    net = [nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU()), nn.Sequential(nn.Conv1d(8, 8, 5), nn.ReLU())]
    run = fitted(tmp_path, signals(), net, input="signal", channels="last")
    assert run.record.test_accuracy == 1


@pytest.mark.parametrize("net", ["cnn:4", "vit:depth=1,width=8,heads=2,patch=2", "lcmlp:4"])
def test_nets_for_images_refuse_signals(tmp_path: Path, net: str) -> None:
    with pytest.raises(InputError, match="needs images"):
        fitted(tmp_path, signals(), net, input="signal")


def test_augmentation_refuses_signals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs images"):
        fitted(tmp_path, signals(), input="signal", augment="flip", views=2)


@pytest.mark.parametrize(
    ("inputs", "reading"),
    [
        (np.random.default_rng(0).integers(0, 256, (ROWS, 64), np.uint8), {"input": "image"}),
        (tokens(), {"input": "tokens"}),
        (signals(), {"input": "signal", "channels": "last"}),
        (np.random.default_rng(0).integers(0, 256, (ROWS, 4, 4, 4), np.uint8), {"channels": "last"}),
    ],
)
def test_what_was_stated_is_kept_by_resume_evaluate_predict_and_cells(
    tmp_path: Path, inputs: np.ndarray, reading: dict[str, str]
) -> None:
    data = tmp_path / "some.npz"
    np.savez(data, x_train=inputs[:100], y_train=Y[:100], x_test=inputs[100:], y_test=Y[100:])
    values = {"net": "mlp:16x2", "epochs": 3, "device": "cpu", "data": str(data), **reading}
    stopped_after(4, resolve(values, None, {}), tmp_path / "a", None)
    run = edgetrain.fit("mlp:16x2", str(data), run_dir=tmp_path / "a", resume=True)
    alone = edgetrain.fit("mlp:16x2", str(data), run_dir=tmp_path / "b", epochs=3, device="cpu", **reading)
    assert run.record.test_accuracy == alone.record.test_accuracy
    assert run.evaluate().accuracy == run.evaluate(str(data)).accuracy == run.evaluate((inputs[100:], Y[100:])).accuracy
    assert np.array_equal(run.predict(inputs[100:]), run.predict(str(data)))
    assert run.record.input == edgetrain.append_cells(run, "mlp:16x3", epochs=1).record.input
    with pytest.raises(InputError, match="was begun with"):
        edgetrain.fit("mlp:16x2", str(data), run_dir=tmp_path / "a", resume=True, input="table")


def test_arrays_are_read_as_the_run_s_were(tmp_path: Path) -> None:
    run = fitted(tmp_path, tokens(), input="tokens", epochs=1)
    arrays = (tokens()[:100], Y[:100]), (tokens()[100:], Y[100:])
    assert edgetrain.fit("mlp:16x2", arrays, run_dir=run.path, resume=True).record == run.record
    assert len(edgetrain.append_cells(run, "mlp:16x3", arrays, epochs=1).record.cells) == 4


def test_a_data_set_that_is_read_already_takes_no_statement(tmp_path: Path) -> None:
    data = from_arrays((tokens(), Y), reading=Reading("tokens"))
    with pytest.raises(InputError, match="--input"):
        edgetrain.fit("mlp:16", data, run_dir=tmp_path / "run", input="tokens")


def test_pixels_have_the_range_of_the_run_s(tmp_path: Path) -> None:
    run = edgetrain.fit("mlp:16", "digits", run_dir=tmp_path / "run", epochs=2)
    with np.load(Path(edgetrain.__file__).parent / "data" / "digits.npz") as digits:
        found = run.evaluate((digits["x_test"], digits["y_test"]))
        assert found.accuracy == run.evaluate().accuracy
        brighter = digits["x_test"].copy()
        brighter[5, 0, 3] = 17
    with pytest.raises(InputError, match="inputs: row 5 holds 17 at position 3, expected pixels 0..16"):
        Run.open(run.path).predict(brighter)


@pytest.mark.parametrize("method", ["lbp-ae", "lbp-cae", "lbp-dae", "mf"])
def test_float_images_below_zero_are_rescaled_for_rules_that_reconstruct(tmp_path: Path, method: str) -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, 1, 8, 8)).astype(np.float32) + 3 * Y[:, None, None, None]
    reconstructs = method != "mf"
    net = "cnn:4" if method == "lbp-cae" else "mlp:16x2"
    run = fitted(tmp_path, x, net, method=method, normalize="none")
    said = "values scaled to 0..1 unless they are within it" if reconstructs else "values as they are"
    assert run.record.input == f"100 images, 1x8x8, {said}, channels first"
    rows = run.model().prepared(torch.from_numpy(x))
    by_hand = (x.astype(np.float64) - x.min()) * (1 / (float(x.max()) - float(x.min())))
    assert np.allclose(rows, by_hand if reconstructs else x, atol=1e-6)
    scores = run.model()(torch.from_numpy(x)).detach().numpy()
    assert np.allclose(scores, run.scores(x), atol=1e-4)
    beyond = run.model().prepared(torch.from_numpy(3 * x))
    assert not reconstructs or (beyond.min() >= 0 and beyond.max() <= 1)


def test_float_images_within_0_to_1_stay_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((ROWS, 1, 8, 8), np.float32) * 0.5
    run = fitted(tmp_path, x, method="lbp-ae")
    assert torch.equal(run.model().prepared(torch.from_numpy(x)), torch.from_numpy(x))


@pytest.mark.parametrize("unknown", [np.full(ROWS, -1), np.where(np.arange(ROWS) % 3, Y, -1), np.full(ROWS, np.nan)])
def test_rows_with_unknown_labels_are_predicted_but_not_evaluated(tmp_path: Path, unknown: Any) -> None:
    run = fitted(tmp_path, signals(), input="signal", channels="last")
    np.savez(tmp_path / "rows.npz", x=signals(), y=unknown)
    assert np.array_equal(run.predict(str(tmp_path / "rows.npz")), run.predict(signals()))
    for rows in (str(tmp_path / "rows.npz"), (signals(), unknown)):
        with pytest.raises(InputError, match=r"rows without labels \(-1 is unknown\)"):
            run.evaluate(rows)
