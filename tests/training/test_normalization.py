"""Images normalised channel by channel: what a run reads, keeps and ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import assert_same, stopped_after, units

import edgetrain
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.errors import InputError
from edgetrain.store.rows import Normalization, RowFormat
from edgetrain.training.fit import fit

ROWS, CLASSES = 96, 3
FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu"}


def images(kind: str, rows: int = ROWS, channels: int = 3) -> tuple[Any, Any]:
    draw = np.random.default_rng(1)
    y = np.arange(rows) % CLASSES
    x = (
        draw.integers(0, 120, (rows, channels, 6, 6))
        + 40 * y[:, None, None, None]
        + 15 * np.arange(channels)[:, None, None]
    )
    return (x.astype(np.uint8) if kind == "pixels" else (x / 7 - 3).astype(np.float32)), y


def by_hand(x: Any, kind: str) -> Any:
    values = x.astype(np.float64) / (255 if kind == "pixels" else 1)
    axes = (0, 2, 3)
    return (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True)


def trained(path: Path, given: Any, method: str = "mf", **more: Any) -> edgetrain.Run:
    net = more.pop("net", "mlp:24x2")
    return edgetrain.fit(net, given, method, run_dir=path, channels="first", **{**FAST, **more})


@pytest.mark.parametrize("kind", ["pixels", "floats"])
def test_the_model_normalises_by_mean_and_deviation_of_the_training_rows(kind: str, tmp_path: Path) -> None:
    x, y = images(kind)
    run = trained(tmp_path / "run", (x, y), normalize="data")
    rows = run.model().prepared(torch.from_numpy(x)).numpy()
    assert np.allclose(rows, by_hand(x, kind), atol=1e-5)
    assert np.allclose(run.model()(torch.from_numpy(x)).detach().numpy(), run.scores(x), atol=1e-4)
    assert "normalised by the training images" in run.record.input
    again = edgetrain.open_run(run.path)
    assert np.allclose(again.scores(x[:9]), run.scores(x)[:9], atol=1e-5)


@pytest.mark.parametrize("method", ["mf", "bp", "sll", "ff", "predsim", "symba"])
@pytest.mark.parametrize("kind", ["pixels", "floats"])
def test_a_normalised_run_is_the_run_on_rows_that_were_normalised_before(
    kind: str, method: str, tmp_path: Path
) -> None:
    x, y = images(kind)
    values = torch.from_numpy(x).float().div(255) if kind == "pixels" else torch.from_numpy(x).clone()
    axes = (0, 2, 3)
    exact = (torch.from_numpy(x).double() / (255 if kind == "pixels" else 1)).numpy()
    mean, std = exact.mean(axes), exact.std(axes)
    for channel in range(3):
        values[:, channel].sub_(float(mean[channel])).div_(float(std[channel]))
    stated = f"{','.join(map(repr, mean.tolist()))}/{','.join(map(repr, std.tolist()))}"
    run = trained(tmp_path / "run", (x, y), method, normalize=stated)
    before = trained(tmp_path / "before", (values.numpy(), y), method, normalize="none")
    found, expected = units(run.path), units(before.path)
    assert_same({name: found[name] for name in expected if "inputs" not in name}, expected)
    assert np.array_equal(run.scores(x), before.scores(values.numpy()))
    measured = trained(tmp_path / "measured", (x, y), method, normalize="data")
    assert np.allclose(measured.scores(x), run.scores(x), atol=1e-3)


def test_flattened_and_grey_images_have_one_mean(tmp_path: Path) -> None:
    x, y = images("pixels", channels=1)
    for number, (rows, reading) in enumerate(((x[:, 0], {}), (x.reshape(ROWS, -1), {"input": "image"}))):
        run = edgetrain.fit("mlp:8", (rows, y), run_dir=tmp_path / str(number), normalize="data", **FAST, **reading)
        values = rows / 255.0
        expected = (values - values.mean()) / values.std()
        found = run.model().prepared(torch.from_numpy(rows)).numpy()
        assert np.allclose(found.reshape(rows.shape), expected, atol=1e-5)


def test_a_constant_channel_becomes_nothing(tmp_path: Path) -> None:
    x, y = images("pixels")
    x[:, 1] = 77
    run = trained(tmp_path / "run", (x, y), normalize="data")
    assert float(run.model().prepared(torch.from_numpy(x))[:, 1].abs().max()) < 1e-6
    assert run.record.test_accuracy is None
    assert np.isfinite(run.scores(x)).all()


@pytest.mark.parametrize("schedule", ["separate", "sequence"])
def test_a_normalised_run_resumes_to_the_same_bits_within_its_predicted_peak(schedule: str, tmp_path: Path) -> None:
    x, y = images("pixels")
    rows = from_arrays((x, y), (x[:20], y[:20]), reading=Reading(channels="first"))
    values = {**FAST, "net": "cnn:4,4", "schedule": schedule, "normalize": "data", "channels": None, "augment": None}
    asked = Settings().with_values({**values, "checkpoint_every": 0.0, "placement": "stream"})
    whole = fit(asked, tmp_path / "whole", data=rows)
    assert whole.record.peak_gpu_mb == whole.record.predicted_peak_mb
    stopped_after(6, asked, tmp_path / "cut", rows)
    fit(asked, tmp_path / "cut", data=rows, resume=True)
    assert_same(units(tmp_path / "cut"), units(whole.path))
    resident = fit(asked.with_values({"placement": "resident"}), tmp_path / "resident", data=rows)
    assert_same(units(resident.path), units(whole.path))
    assert whole.evaluate((x[:20], y[:20])).accuracy == whole.evaluate(rows).accuracy


def test_augmented_images_are_normalised_first(tmp_path: Path) -> None:
    x, y = images("pixels")
    augmented = {"augment": "crop,flip", "schedule": "sequence", "net": "cnn:4"}
    stated = "0.5,0.25,0.75/0.5,2.0,0.25"
    values = torch.from_numpy(x).float().div(255)
    for channel, (mean, std) in enumerate(((0.5, 0.5), (0.25, 2.0), (0.75, 0.25))):
        values[:, channel].sub_(mean).div_(std)
    run = trained(tmp_path / "run", (x, y), normalize=stated, **augmented)
    before = trained(tmp_path / "before", (values.numpy(), y), normalize="none", **augmented)
    expected = units(before.path)
    assert_same({name: value for name, value in units(run.path).items() if name in expected}, expected)
    plain = trained(tmp_path / "plain", (x, y), normalize=stated, schedule="sequence", net="cnn:4")
    assert not torch.equal(units(plain.path)["000/cell.conv.weight"], expected["000/cell.conv.weight"])


def test_imagenet_s_statistics(tmp_path: Path) -> None:
    x, y = images("pixels")
    run = trained(tmp_path / "run", (x, y), normalize="imagenet")
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = run.model().prepared(torch.from_numpy(x)).numpy()
    assert np.allclose(found, (x / 255 - mean) / std, atol=1e-5)


def test_decoding_leaves_the_stored_rows_as_they_are() -> None:
    layout = RowFormat((2, 3, 3), "float32", normalization=Normalization((1.0, 2.0), (0.5, 4.0)))
    rows = layout.encode(torch.randn(5, 2, 3, 3))
    before = rows.clone()
    first, second = layout.decode(rows), layout.decode(rows)
    assert torch.equal(rows, before)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("given", "method", "normalize", "said"),
    [
        ("pixels", "mf", "data/", "expected data, imagenet, none, or means"),
        ("pixels", "mf", "0.5/0.5", "has 1 channels; the images have 3"),
        ("pixels", "mf", "0.5,0.5,0.5/1,1,0", "expected data"),
        ("pixels", "mf", "0.5,0.5,nan/1,1,1", "expected data"),
        ("pixels", "mf", "0.5,0.5,0.5/1,1", "expected data"),
        ("pixels", "lbp-ae", "data", "this rule reconstructs its inputs"),
        ("table", "mf", "data", "is for images; the columns of tables"),
    ],
)
def test_what_cannot_be_normalised_is_refused(
    given: str, method: str, normalize: str, said: str, tmp_path: Path
) -> None:
    x, y = images("pixels")
    rows = (x.reshape(ROWS, -1).astype(np.float32), y) if given == "table" else (x, y)
    with pytest.raises(InputError, match=said):
        edgetrain.fit("mlp:8", rows, method, run_dir=tmp_path / "run", normalize=normalize, **FAST)
    assert not (tmp_path / "run").exists()
