"""The timelines that a run keeps. ``pytest tests/planning/test_timelines.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machine import data, settings

from edgetrain.memory.meter import LiveBytes, LiveMeter
from edgetrain.memory.timeline import Timeline
from edgetrain.planning import timelines
from edgetrain.planning.planner import backprop_peak
from edgetrain.record import KINDS, MemorySeries
from edgetrain.training import fit as fitting
from edgetrain.training import session
from edgetrain.training.job import Job, open_job, plan_job
from edgetrain.training.methods import METHODS
from edgetrain.training.run import read_record
from edgetrain.units import MIB, to_mb


def job_of(**given: Any) -> Job:
    images = given["method"] in ("lbp-cae", "sll+")
    return open_job(settings(**given), data=data("wide images" if images else "pixels").set)


def peak(series: MemorySeries) -> dict[str, float]:
    rows = np.array(series.mb)
    return dict(zip(KINDS, rows[rows.sum(1).argmax()].tolist(), strict=True))


NETS = {"lbp-cae": "cnn:4,8", "sll+": "vit:depth=2,width=12,heads=2,patch=4", "slp": None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("placement", ["stream", "resident"])
def test_a_timeline_reaches_the_predicted_peak(method: str, placement: str) -> None:
    if placement == "resident" and METHODS[method].streams_layers:
        pytest.skip("it streams its layers")
    job = job_of(method=method, net=NETS.get(method, "mlp:24x3"), placement=placement, schedule=None)
    plan = plan_job(job)
    found = timelines.of_run(job.work, plan)
    epochs = 2 if placement == "resident" and job.work.emits_in_training else 1
    assert sum(series.count for series in found) == epochs * len(plan.visits)
    assert max(series.peak_mb for series in found) == to_mb(plan.predicted_peak)
    for series in found:
        rows = np.array(series.mb)
        assert rows.shape[1] == len(KINDS)
        assert rows.min() >= 0
        assert rows.sum(1).max() == pytest.approx(series.peak_mb, abs=0.01)
        assert series.peak_at.startswith("aten.")
        if method != "slp" and series.name != "classifier":
            assert rows[:, KINDS.index("weights")].max() > 0


def test_kinds_of_a_dense_mono_forward_cell_by_its_closed_form() -> None:
    batch, width, classes = 16, 240, 4
    job = job_of(method="mf", net=f"mlp:{width}x3", batch_size=batch)
    second = timelines.of_run(job.work, plan_job(job))[1]
    params = width * width + width * classes
    rows = np.array(second.mb) * MIB
    most = dict(zip(KINDS, rows.max(0).tolist(), strict=True))
    assert job.work.classes == classes
    assert most["weights"] == pytest.approx(4 * params, rel=0.05)
    assert most["optimizer state"] == pytest.approx(8 * params, rel=0.05)
    assert most["gradients"] == pytest.approx(4 * params, rel=0.05)


def test_equal_cells_in_a_row_stand_there_once() -> None:
    job = job_of(method="mf", net="mlp:24x40")
    found = timelines.of_run(job.work, plan_job(job))
    assert [series.count for series in found] == [1, 38, 1]  # the last hands nothing on


def test_backpropagation_s_timeline_reaches_its_peak_unless_the_net_is_too_deep() -> None:
    job = job_of(method="mf", net="mlp:24x5")
    series = timelines.of_backpropagation(job.work, job.net)
    assert series is not None
    assert series.peak_mb == to_mb(backprop_peak(job.work, job.net))
    assert "in the backward pass" in series.peak_at
    deep = job_of(method="mf", net="mlp:24x65")
    assert timelines.of_backpropagation(deep.work, deep.net) is None


@pytest.mark.parametrize("placement", ["stream", "resident"])
@pytest.mark.parametrize(
    ("method", "given"),
    [("mf", {}), ("mf", {"schedule": "sequence"}), ("lbp-ae", {}), ("ff", {}), ("sll", {}), ("bp", {})],
)
def test_the_real_run_s_timeline_is_the_dry_run_s(
    method: str, given: dict[str, Any], placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = Timeline()
    monkeypatch.setattr(session, "meter_of", lambda device, full: LiveMeter(True, LiveBytes(timeline)))
    asked = settings(method=method, net="mlp:24x2", placement=placement, epochs=2, **given)
    fitting.fit(asked, tmp_path / "run", data=data("pixels").set)
    record, _ = read_record(tmp_path / "run")
    predicted = max(record.memory, key=lambda series: series.peak_mb)
    live = timeline.bytes_by_kind() / MIB
    assert to_mb(timeline.peak) == predicted.peak_mb
    highest, expected = live[live.sum(1) == live.sum(1).max()].round(4), np.array(list(peak(predicted).values()))
    if method == "sll":  # autograd sums fake gradients into new tensors, real ones in place
        gradients = KINDS.index("gradients")
        highest[:, -1] += highest[:, gradients]
        expected[-1] += expected[gradients]
        highest[:, gradients] = expected[gradients] = 0
    assert any(np.allclose(row, expected, atol=2e-4) for row in highest)


def test_a_run_keeps_its_timelines_and_those_of_backpropagation(tmp_path: Path) -> None:
    for method, compared in (("mf", True), ("bp", False)):
        fitting.fit(settings(method=method, net="mlp:24x2"), tmp_path / method, data=data("pixels").set)
        record, _ = read_record(tmp_path / method)
        assert record.memory
        assert record.memory[-1].mb
        assert (record.bp_memory is not None) == compared
