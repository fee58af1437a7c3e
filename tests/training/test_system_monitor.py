"""What a run notices of its surroundings, and what it does when memory runs out; simulated, as no GPU is needed.

``pytest tests/training/test_system_monitor.py``
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetrain.config import Settings, read_profile
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.errors import BudgetError, InputError
from edgetrain.memory import device as devices
from edgetrain.planning.plan import Plan
from edgetrain.planning.planner import require_fit
from edgetrain.planning.storage import staging_bytes
from edgetrain.planning.words import plan_in_words
from edgetrain.training import checkpointing, trainer
from edgetrain.training.callbacks import Callback
from edgetrain.training.checkpointing import Position
from edgetrain.training.fit import fit
from edgetrain.training.job import budget_of, open_job, outside_of, plan_job
from edgetrain.training.system_monitor import SystemMonitor
from edgetrain.training.trainer import Trainer
from edgetrain.units import MIB

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PLENTY = (1 << 40, 1 << 41)


def data() -> DataSet:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(120, 10)).astype(np.float32), np.arange(120) % 3
    return from_arrays((x[:100], y[:100]), (x[100:], y[100:]))


def asked(**values: Any) -> Settings:
    standard = {"net": "mlp:24x2", "epochs": 2, "batch_size": 32, "threads": 1, "device": "cpu"}
    return Settings().with_values({**standard, **values})


class Heard(Callback):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# -- looking around ------------------------------------------------------------------------------------


def test_free_device_memory_that_shrinks_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "reserved_bytes", lambda device: 100 * MIB)
    free, said = [900 * MIB], []
    watch = SystemMonitor(CUDA, 500 * MIB, said.append, lambda device: free[0], lambda: PLENTY)
    assert not watch.look()
    assert said == []
    free[0] = 399 * MIB
    watch.look()
    watch.look()
    assert len(said) == 1
    assert "only 399.0 MiB of device memory is free" in said[0]
    assert "400.0 MiB" in said[0]


def test_unknown_free_memory_and_runs_without_a_budget_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "reserved_bytes", lambda device: 0)
    said: list[str] = []
    SystemMonitor(CUDA, 1 << 50, said.append, lambda device: None, lambda: PLENTY).look()
    SystemMonitor(CUDA, None, said.append, lambda device: 0, lambda: PLENTY).look()
    SystemMonitor(CPU, 1 << 50, said.append, lambda device: 0, lambda: PLENTY).look()
    assert said == []


def test_steps_that_become_slow_are_said_once_and_short_or_single_ones_are_not() -> None:
    said: list[str] = []
    watch = SystemMonitor(CPU, None, said.append, host=lambda: PLENTY)
    for seconds in (10.0, 16.0, 10.0, 16.0):
        watch.visited(0, 100, seconds)
    for seconds in (0.1, 1.9, 1.9, 1.9):
        watch.visited(1, 100, seconds)
    assert said == []
    for seconds in (16.0, 17.0, 18.0):
        watch.visited(0, 100, seconds)
    assert len(said) == 1
    assert "steps take 1.7 times as long as at first" in said[0]


def test_ranges_of_different_length_are_compared_by_step() -> None:
    said: list[str] = []
    watch = SystemMonitor(CPU, None, said.append, host=lambda: PLENTY)
    for steps, seconds in ((10, 5.0), (40, 20.0), (40, 21.0)):
        watch.visited(0, steps, seconds)
    assert said == []


def test_a_run_whose_system_runs_out_of_memory_checkpoints_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, save = [], Trainer._save

    def counted(self: Trainer, position: Position) -> None:
        made.append((position.visit, position.step))
        save(self, position)

    monkeypatch.setattr(Trainer, "_save", counted)
    monkeypatch.setattr(checkpointing, "_IN_NEED_S", 0.0)
    monkeypatch.setattr(checkpointing, "_LOOK_EVERY_S", 0.0)
    fit(asked(), tmp_path / "calm", data=data())
    assert made == [(4, 0)]
    short = partial(SystemMonitor, host=lambda: (100 * MIB, 8 << 30))
    monkeypatch.setattr(trainer, "SystemMonitor", short)
    heard = Heard()
    fit(asked(), tmp_path / "short", data=data(), callback=heard)
    assert {visit for visit, _ in made} == {0, 1, 2, 3, 4}
    assert len([note for note in heard.notes if "only 100.0 MiB of system memory is left" in note]) == 1


# -- out of memory all the same ------------------------------------------------------------------------


def fails(monkeypatch: pytest.MonkeyPatch, times: int, error: Exception, visit: int = 2) -> None:
    """Let the first tries of training end with ``error`` in their second visit."""
    carry_out, state = Trainer._train, {"left": times, "visit": 0}

    def failing(self: Trainer, *arguments: Any) -> Any:
        state["visit"] += 1
        if state["left"] and state["visit"] == visit:
            state["left"], state["visit"] = state["left"] - 1, 0
            raise error
        return carry_out(self, *arguments)

    monkeypatch.setattr(Trainer, "_train", failing)


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore"), MemoryError(),
     RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")],
)  # fmt: skip
@pytest.mark.parametrize("checkpoint_every", [None, 0.0])
def test_out_of_memory_is_said_and_tried_once_more_with_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, checkpoint_every: float | None
) -> None:
    plain = fit(asked(), tmp_path / "plain", data=data())
    fails(monkeypatch, 1, error)
    heard = Heard()
    run = fit(asked(checkpoint_every=checkpoint_every), tmp_path / "run", data=data(), callback=heard)
    assert [cell.micro_batch for cell in run.record.cells] == [16, 16]
    assert read_profile(tmp_path / "run" / "config.toml")["plan"]["micro_batch"] == 16
    said = [note for note in heard.notes if "out of memory although" in note]
    assert len(said) == 1
    assert "trying once more, with micro-batches of 16" in said[0]
    assert "predicted peak was" in said[0]
    assert run.record.cells[1].train_loss == pytest.approx(plain.record.cells[1].train_loss, rel=1e-3)


def test_out_of_memory_twice_is_exit_code_6_and_what_was_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, 2, torch.cuda.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(BudgetError, match="out of memory although .* use a smaller"):
        fit(asked(), tmp_path / "run", data=data())
    assert not (tmp_path / "run").exists()


def test_batches_that_cannot_be_split_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 1, torch.cuda.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(BudgetError, match="out of memory although"):
        fit(asked(method="predsim"), tmp_path / "run", data=data())


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, 1, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        fit(asked(), tmp_path / "run", data=data())


# -- what lies outside the allocator -------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A pretended device of 4 GiB whose facts a test may change."""
    facts: dict[str, Any] = {"context": 300 * MIB, "integrated": False}
    monkeypatch.setattr(devices, "default_budget", lambda device: 3000 * MIB)
    monkeypatch.setattr(devices, "total_bytes", lambda device: 4096 * MIB)
    monkeypatch.setattr(devices, "context_bytes", lambda device: facts["context"])
    monkeypatch.setattr(devices, "is_integrated", lambda device: facts["integrated"])
    return facts


def test_the_context_comes_off_the_budget_when_asked(gpu: dict[str, Any]) -> None:
    work = open_job(asked(), data=data()).work
    assert budget_of(asked(max_gpu_mb=512), work) == 512 * MIB
    assert budget_of(asked(max_gpu_mb=512, count_context=True), work) == 212 * MIB
    assert budget_of(asked(count_context=True), work) == 2700 * MIB
    with pytest.raises(InputError, match=r"taken up by the CUDA context \(300.0 MiB\)"):
        budget_of(asked(max_gpu_mb=256, count_context=True), work)
    gpu["context"] = None
    with pytest.raises(InputError, match="--count-context: .* unknown here; leave the flag out"):
        budget_of(asked(max_gpu_mb=512, count_context=True), work)


def test_batches_on_the_host_come_off_the_budget_of_a_device_that_shares_its_memory(gpu: dict[str, Any]) -> None:
    work = open_job(asked(), data=data()).work
    gpu["integrated"] = True
    assert budget_of(asked(max_gpu_mb=512), work) == 512 * MIB - staging_bytes(work)
    with pytest.raises(InputError, match="memory that device and host share"):
        budget_of(asked(max_gpu_mb=staging_bytes(work) / MIB), work)


@pytest.mark.slow
@pytest.mark.parametrize("outside", ["context", "staging", "both"])
@pytest.mark.parametrize("values", [{}, {"method": "bp"}, {"method": "sll"}])
def test_the_budget_that_a_refusal_names_is_accepted(gpu: dict[str, Any], outside: str, values: dict[str, Any]) -> None:
    values = {**values, "net": "mlp:200x2", "count_context": outside != "staging"}
    gpu["context"], gpu["integrated"] = int(12.34 * MIB), outside != "context"

    def plan(budget: float) -> Plan:
        return plan_job(open_job(asked(max_gpu_mb=budget, **values), data=data()))

    taken = sum(outside_of(asked(**values), open_job(asked(**values), data=data()).work).values())
    tight = plan(taken / MIB + 0.001)
    with pytest.raises(BudgetError, match="--max-gpu-mb .* cannot hold") as refused:
        require_fit(tight)
    named = float(str(refused.value).split()[-2])
    assert named == tight.as_dict(None)["min_budget_mb"]
    accepted = plan(named)
    require_fit(accepted)
    assert accepted.as_dict(None)["budget_mb"] == pytest.approx(named, abs=0.001)
    assert not plan(named - 0.02).fits
    assert any(f"smallest budget that works is {named:.2f} MiB" in line for line in plan_in_words(tight, 0, None))


def test_a_record_keeps_the_budget_as_it_was_stated(gpu: dict[str, Any], tmp_path: Path) -> None:
    record = fit(asked(max_gpu_mb=512, count_context=True), tmp_path / "run", data=data()).record
    assert record.budget_mb == 512


def test_a_budget_larger_than_the_device_is_refused(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    work = open_job(asked(), data=data()).work
    pretended = replace(work, device=CUDA)
    with pytest.raises(InputError, match="the device has 4096 MiB"):
        budget_of(asked(max_gpu_mb=5000), pretended)
