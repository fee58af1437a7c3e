"""A finished run as one module gives the classes that ``predict`` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgetrain
from edgetrain.objectives import OBJECTIVES

FAST = {"epochs": 2, "batch_size": 32, "threads": 1, "device": "cpu"}


def table() -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    x = draw.normal(3, 5, (120, 10)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] > 6).astype(np.int64)


def images() -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (90, 8, 8), dtype=np.uint8), np.arange(90) % 3


DENSE = [method for method in (*OBJECTIVES, "bp", "slp", "fa", "dfa") if method not in ("lbp-cae", "sll+")]
CASES = [
    *((method, "mlp:12x2", table) for method in DENSE),
    ("lbp-cae", "cnn:4,6", images),
    ("mf", "cnn:4,6", images),
    ("ff", "mlp:20x2", images),
    ("sll+", "vit:depth=2,width=8,heads=2,patch=4", images),
]


@pytest.mark.parametrize(("method", "net", "data"), CASES)
def test_the_model_is_the_classifier(method: str, net: str, data: Any, tmp_path: Path) -> None:
    x, y = data()
    values = {} if method == "slp" else {"net": net}
    run = edgetrain.fit(values.get("net", "mlp:4"), (x, y), method, run_dir=tmp_path / "run", **FAST)
    model = run.model()
    scores = model(torch.from_numpy(x))
    assert not model.training
    assert np.array_equal(scores.argmax(1).numpy(), run.predict(x))
    np.testing.assert_allclose(scores.detach().numpy(), run.scores(x), rtol=1e-4, atol=1e-4)
    again = run.model()
    again.load_state_dict(model.state_dict())
    assert isinstance(run.cells(), nn.Sequential)


def test_a_classifier_trained_on_request_is_no_vote_of_its_own(tmp_path: Path) -> None:
    x, y = images()
    run = edgetrain.fit("mlp:20x2", (x, y), "ff", run_dir=tmp_path / "run", classifier_epochs=2, **FAST)
    assert np.array_equal(run.model()(torch.from_numpy(x)).argmax(1).numpy(), run.predict(x))
