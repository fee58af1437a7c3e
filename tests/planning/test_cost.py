"""Times of a plan, from work counted operation by operation. ``pytest tests/planning/test_cost.py``."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.memory import rates
from edgetrain.memory.host import disk_rates
from edgetrain.memory.rates import Rates
from edgetrain.planning.cost import OperationTime, visit_times
from edgetrain.planning.plan import VisitTime
from edgetrain.planning.words import plan_in_words
from edgetrain.training.job import Job, open_job, plan_job, times_of
from edgetrain.units import MIB

CPU = torch.device("cpu")
SLOW_ARITHMETIC = Rates(flops=1e6, memory=1e30, call_s=0.0, bus=None, disk_read=None, disk_write=None)
MUCH = 1 << 60


def asked(method: str, **values: object) -> Settings:
    standard = {"net": "mlp:40,64,24,48", "epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu"}
    return Settings().with_values({"method": method, **standard, **values})


def table(rows: int = 300, width: int = 12) -> DataSet:
    x = np.random.default_rng(5).normal(size=(rows + 20, width)).astype(np.float32)
    y = np.arange(rows + 20) % 4
    return from_arrays((x[:rows], y[:rows]), (x[rows:], y[rows:]))


def timed(job: Job, of: Rates, page_cache: int = MUCH) -> list[VisitTime]:
    return visit_times(job.work, plan_job(job), of, page_cache)


def test_operations_take_the_longer_of_arithmetic_and_bytes_and_a_call() -> None:
    x, weights = torch.ones(4, 8), torch.ones(8, 16)
    for overlaps in (False, True):
        clock = OperationTime(Rates(1000.0, 100.0, 0.5, None, None, None), overlaps)
        with clock:
            (x @ weights).t()
        work = max(2 * 4 * 8 * 16 / 1000, 4 * (4 * 8 + 8 * 16 + 4 * 16) / 100)
        assert clock.seconds == pytest.approx(max(work, 0.5) if overlaps else work + 0.5)
        assert clock.calls == 1


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("tiles", [None, 3])
def test_arithmetic_is_that_of_the_real_step_and_of_the_papers(micro_batch: int | None, tiles: int | None) -> None:
    job = open_job(asked("mf", net="mlp:48", tiles=tiles, micro_batch=micro_batch, epochs=3), data=table(160, 12))
    (found,) = timed(job, SLOW_ARITHMETIC)
    d, n, classes, rows = 12, 48, 4, 160
    # forward and weight gradient of the cell; of the head forward and both gradients
    flops = 3 * rows * (2 * 2 * d * n + 3 * 2 * n * classes)
    again = 3 * rows * (2 * d * n + 2 * n * classes) if tiles else 0  # forward in both sweeps
    assert found.seconds == pytest.approx((flops + again) / 1e6)


def test_arithmetic_of_backpropagation_is_what_torch_counts() -> None:
    job = open_job(asked("bp", net="mlp:20,30", epochs=2), data=table(64, 12))
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(net(torch.randn(16, 12)), torch.zeros(16, dtype=torch.int64)).backward()
    (found,) = timed(job, SLOW_ARITHMETIC)
    assert found.seconds == pytest.approx(2 * 64 / 16 * counter.get_total_flops() / 1e6)


def test_the_slowest_of_device_bus_and_disk_bounds_a_cell() -> None:
    job = open_job(asked("mf", net="mlp:40x2"), data=table())
    fast = Rates(1e15, 1e15, 0.0, None, None, None)
    assert {time.bound for time in timed(job, fast)} == {"compute"}
    reads = timed(job, replace(fast, disk_read=1e3), page_cache=0)
    assert [time.bound for time in reads] == ["disk", "disk"]
    assert reads[1].seconds == pytest.approx(2 * 300 * 4 * 40 / 1e3)  # epochs, rows, float32 latents
    writes = timed(job, replace(fast, disk_write=1e3))
    assert writes[0].seconds == pytest.approx(300 * 4 * 40 / 1e3)
    assert writes[1].bound == "compute"
    assert timed(job, replace(fast, disk_read=1e3))[1].bound == "compute"  # files that fit stay in memory
    assert [time.bound for time in timed(job, replace(fast, bus=1e3))] == ["bus", "bus"]


def test_what_is_emitted_again_on_a_small_disk_is_counted() -> None:
    whole = open_job(asked("mf", epochs=3), data=table())
    plan = plan_job(whole)
    small = open_job(asked("mf", epochs=3, max_disk_gb=plan.least_disk / (1 << 30)), data=table())
    assert plan_job(small).cut.cached is not None
    first, *_, last = zip(timed(whole, SLOW_ARITHMETIC), timed(small, SLOW_ARITHMETIC), strict=True)
    assert last[0] == last[1]
    assert first[1].seconds > first[0].seconds


def test_rates_are_measured_kept_by_device_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "_ROUND_S", 0.001)
    monkeypatch.setattr(rates, "disk_rates", partial(disk_rates, size=MIB))
    assert rates.load(CPU) is None
    found = rates.measure(CPU, tmp_path)
    assert min(found.flops, found.memory, found.call_s) > 0
    assert found.bus is None
    rates.save(found, CPU)
    assert rates.load(CPU) == found
    job = open_job(asked("mf", threads=torch.get_num_threads()), data=table())
    times = times_of(job, plan_job(job))
    assert times is not None
    assert plan_job(job).as_dict(None, times)["seconds"] == round(times.seconds, 1)
    assert times.measured == date.today().isoformat()
    assert f"measured on {times.measured}" in " ".join(plan_in_words(plan_job(job), None, times))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"KEY": {"flops": 1}}', '{"KEY": 3}', "\xff\xfe"])
def test_damaged_rates_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "edgetrain" / "rates.json"
    path.parent.mkdir()
    path.write_text(text.replace("KEY", json.dumps(rates._key(CPU))[1:-1]), encoding="latin-1")
    assert rates.load(CPU) is None


def test_the_fastest_of_several_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 0.9, 1.0, 1.2, 2.0, 2.3, 3.0, 3.4, 4.0, 4.5])  # five rounds
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(seconds))
    assert rates._tried(CPU, lambda: None) == pytest.approx(0.2 / 8)


def test_rates_are_those_of_a_power_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for mode in (None, "0 (MAXN)", "2 (15W)"):
        monkeypatch.setattr(rates.facts, "power_mode", lambda mode=mode: mode)
        keys.add(rates._key(CPU))
    assert len(keys) == 3
