"""The same promises on a CUDA device: budget, prediction, and bits that do not depend on the placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from machine import named

from edgetrain.config import Settings
from edgetrain.store.run import RunFolder
from edgetrain.training.fit import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: waits for a GPU"),
]


@pytest.mark.parametrize("method", ["mf", "lbp-ae", "lbp-dae", "bp"])
@pytest.mark.parametrize("budget", [16.0, 64.0])
def test_a_run_stays_within_its_budget_and_its_prediction(method: str, budget: float, tmp_path: Path) -> None:
    settings = Settings(net="mlp:256x3", method=method, epochs=2, batch_size=64, device="cuda", max_gpu_mb=budget)
    record = fit(settings, tmp_path / "run").record
    assert record.peak_gpu_mb is not None
    assert record.predicted_peak_mb is not None
    assert record.peak_gpu_mb <= budget
    assert record.peak_gpu_mb <= record.predicted_peak_mb
    assert record.predicted_peak_mb - record.peak_gpu_mb <= max(1.0, 0.02 * record.peak_gpu_mb)


@pytest.mark.parametrize("method", ["mf", "lbp-dae"])
@pytest.mark.parametrize("schedule", ["separate", "sequence"])
def test_streamed_and_resident_give_the_same_bits(method: str, schedule: str, tmp_path: Path) -> None:
    found = []
    for placement in ("stream", "resident"):
        settings = Settings(net="mlp:96x3", method=method, epochs=2, batch_size=50, device="cuda")
        settings = settings.with_values({"schedule": schedule, "placement": placement})
        folder = RunFolder(fit(settings, tmp_path / placement).path)
        found.append({unit: named(folder.units.read(files)) for unit, files in folder.files().items()})
    for unit, tensors in found[0].items():
        for name, value in tensors.items():
            assert torch.equal(value, found[1][unit][name]), f"{unit} {name}"
