"""Forward-Forward reads the label as input: beside a table's columns, over an image's first pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgetrain
from edgetrain.errors import InputError

FAST = {"batch_size": 32, "threads": 1, "device": "cpu"}


def blobs(columns: int, classes: int) -> tuple[Any, Any]:
    draw = np.random.default_rng(1)
    y = draw.integers(0, classes, 400)
    y[:classes] = np.arange(classes)
    return (draw.normal(size=(classes, columns))[y] * 4 + draw.normal(size=(400, columns))).astype(np.float32), y


@pytest.mark.parametrize("method", ["ff", "symba"])
@pytest.mark.parametrize(("columns", "classes"), [(4, 4), (4, 3), (2, 3), (3, 5)])
def test_tables_keep_all_their_columns(method: str, columns: int, classes: int, tmp_path: Path) -> None:
    x, y = blobs(columns, classes)
    run = edgetrain.fit("mlp:48x2", (x, y), method, epochs=15, run_dir=tmp_path / "run", **FAST)
    mf = edgetrain.fit("mlp:48x2", (x, y), "mf", epochs=15, run_dir=tmp_path / "mf", **FAST)
    accuracy, reference = ((each.predict(x) == y).mean() for each in (run, mf))
    assert accuracy > reference - 0.08
    assert f"beside the {columns} inputs" in " ".join(run.record.plan)
    assert run.record.cells[0].params == (columns + classes) * 48 + 48


def test_tiles_and_the_classifier_read_the_label_beside_the_columns_too(tmp_path: Path) -> None:
    x, y = blobs(5, 3)
    values = {"epochs": 1, "classifier_epochs": 1, **FAST, "batch_size": 400, "micro_batch": 400}
    one = edgetrain.fit("mlp:64", (x, y), "ff", run_dir=tmp_path / "one", **values)
    two = edgetrain.fit("mlp:64", (x, y), "ff", run_dir=tmp_path / "two", tiles=2, **values)
    torch.testing.assert_close(one.cells().state_dict(), two.cells().state_dict(), rtol=1e-4, atol=1e-5)
    assert one.record.votes.keys() == two.record.votes.keys()


def test_images_hold_the_label_in_their_first_pixels(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (60, 4, 5), dtype=np.uint8), np.arange(60) % 3
    run = edgetrain.fit("mlp:16", (x, y), "ff", epochs=1, run_dir=tmp_path / "run", **FAST)
    assert "over the first 3 of 20 inputs" in " ".join(run.record.plan)
    assert run.record.cells[0].params == 20 * 16 + 16
    with pytest.raises(InputError, match="too little of a sample is left"):
        edgetrain.fit("mlp:16", (x[:, :2, :2], y), "ff", epochs=1, run_dir=tmp_path / "small", **FAST)
    assert not (tmp_path / "small").exists()


def test_a_users_module_reads_the_columns_with_or_without_the_label(tmp_path: Path) -> None:
    x, y = blobs(8, 3)
    told = {}
    for inputs in (8, 11):
        net = [nn.Sequential(nn.Linear(inputs, 16), nn.ReLU())]
        run = edgetrain.fit(net, (x, y), "ff", epochs=2, run_dir=tmp_path / str(inputs), **FAST)
        told[inputs] = " ".join(run.record.plan)
    assert "over the first 3 of 8 inputs" in told[8]
    assert "beside the 8 inputs" in told[11]
    with pytest.raises(InputError, match="give the net 7 inputs"):
        edgetrain.fit([nn.Linear(4, 16)], blobs(4, 3), "ff", epochs=1, run_dir=tmp_path / "few", **FAST)
