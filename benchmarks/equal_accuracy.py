"""Time to equal accuracy under the same budget, where weights and Adam's moments do not fit the device.

Run: python benchmarks/equal_accuracy.py [--rows 20000] [--epochs 3] [--out NAME]

Backpropagation that streams its layers (``bp-stream``, the only form that fits) and Mono-Forward, SLL with the same
net, rows, batch and threads, each at the better of two learning rates, chosen by the accuracy on validation rows, with
the same number of trials. The target is the accuracy that backpropagation reaches on the test rows.

* `RAM`: cells wait in the host's memory.
* `slow disk`: cells wait on a disk of 50 MB/s (one rate limiter around every read and write of cells and latents, the
  page cache does not help). The bytes are counted in a few steps, which are all alike, and every byte is waited for.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import edgetrain  # noqa: F401 # isort: skip (before torch, whose threads would otherwise spin while they wait)

import numpy as np
from reporting import publish

from edgetrain.config import Settings
from edgetrain.data.base import DataSet
from edgetrain.data.specs import open_data
from edgetrain.store.latents import LatentFile
from edgetrain.store.units import UnitFiles
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job

NET, BUDGET_MB, BATCH, RATE = "mlp:2000x8", 96.0, 128, 50e6
METHODS: dict[str, dict[str, Any]] = {
    "bp-stream": {},
    "mf": {"schedule": "separate"},
    "mf, sequence": {"schedule": "sequence"},
    "sll": {"schedule": "sequence"},
}
FORMS = ("bp", "bp-checkpoint", "bp-offload", "bp-stream")
RATES = (3e-4, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--net", default=NET)
    parser.add_argument("--budget", type=float, default=BUDGET_MB)
    parser.add_argument("--out")
    asked = parser.parse_args()
    data = part_of(asked.data, asked.rows)
    least = [{"method": f"`{name}`", "smallest budget, MiB": smallest(name, asked, data)} for name in FORMS]
    print(*least, sep="\n", flush=True)
    runs = {name: best(name, asked, data) for name in METHODS}
    target = runs["bp-stream"].test_accuracy or 0.0
    table = [row(name, record, target, asked, data) for name, record in runs.items()]
    rival = table[0]
    for line in table:
        for column in ("RAM", "slow disk"):
            ours, theirs = line[f"{column}: s to the target"], rival[f"{column}: s to the target"]
            line[f"{column}: share of bp-stream's"] = None if ours is None else round(ours / theirs, 3)
        print(line, flush=True)
    title = f"{asked.data}, {asked.rows} rows, {asked.net}, batch {BATCH}, Adam, {asked.budget:g} MiB, 2 threads"
    notes = (
        f"The target is {target:.4f}, what `bp-stream` reaches after {asked.epochs} epochs at its better learning rate."
        " `s to the target` is the time of the epochs until the accuracy on the test rows, by the method's vote of the"
        " cells trained so far, is as high (`-`: never); `whole run` is the time of all cells and epochs."
    )
    publish(asked.out, "Time to equal accuracy", {"What fits": least, title: table}, notes)


def part_of(name: str, rows: int) -> DataSet:
    """The first rows of a known data set, and its test rows."""
    from edgetrain.data.arrays import from_arrays

    found = open_data(name)
    parts = []
    for part, count in ((found.train, rows), (found.test, 10_000)):
        assert part is not None
        chunks = list(part.chunks())
        parts.append(tuple(np.concatenate([chunk[index] for chunk in chunks])[:count] for index in (0, 1)))
    return from_arrays(parts[0], parts[1])


def settings(name: str, asked: argparse.Namespace, **more: Any) -> Settings:
    values = {
        "method": name.partition(",")[0], "net": asked.net, "epochs": asked.epochs, "batch_size": BATCH, "threads": 2,
        "device": "cpu", "max_gpu_mb": asked.budget, **METHODS.get(name, {}), **more,
    }  # fmt: skip
    return Settings().with_values(values)


def smallest(name: str, asked: argparse.Namespace, data: DataSet) -> float:
    """The smallest budget in MiB under which a form of backpropagation trains the net."""
    plan = plan_job(open_job(settings(name, asked, max_gpu_mb=None), data=data))
    return round(plan.min_budget / (1 << 20), 1)


def best(name: str, asked: argparse.Namespace, data: DataSet) -> Any:
    """The record of a run with accuracies by epoch, at the learning rate that is best on validation rows."""
    found = {}
    for lr in RATES:
        with tempfile.TemporaryDirectory() as folder:
            trial = settings(name, asked, lr=lr, epochs=1, validation=0.1)
            found[lr] = max(fit(trial, Path(folder) / "run", data=data).record.validation_votes.values())
    lr = max(found, key=lambda rate: found[rate])
    with tempfile.TemporaryDirectory() as folder:
        record = fit(settings(name, asked, lr=lr, evaluate_every=1), Path(folder) / "run", data=data).record
    print(f"{name}: validation {found}, test {record.test_accuracy}", flush=True)
    return record


def row(name: str, record: Any, target: float, asked: argparse.Namespace, data: DataSet) -> dict[str, Any]:
    cells = record.cells
    epoch = [cell.seconds / max(cell.epochs, 1) for cell in cells]
    whole = sum(cell.seconds for cell in cells)
    slow = slow_factor(name, asked, data, whole)
    until = seconds_until(METHODS[name].get("schedule"), cells, epoch, whole / asked.epochs, target)
    return {
        "method": name,
        "test accuracy": record.test_accuracy,
        "peak MiB": record.peak_gpu_mb,
        "RAM: whole run (s)": round(whole, 1),
        "RAM: s to the target": None if until is None else round(until, 1),
        "slow disk: s to the target": None if until is None else round(until * slow, 1),
    }


def seconds_until(schedule: str | None, cells: Any, epoch: list[float], of_all: float, target: float) -> float | None:
    """Seconds of training until the accuracy is at the target."""
    if schedule != "separate":
        reached = [each.epoch for each in cells[-1].evaluations if (each.net_accuracy or 0.0) >= target]
        return reached[0] * of_all if reached else None
    before = 0.0
    for cell, seconds in zip(cells, epoch, strict=True):
        for each in cell.evaluations:
            if (each.net_accuracy or 0.0) >= target:
                return before + each.epoch * seconds
        before += cell.seconds
    return None


@dataclass
class Moved:
    """Bytes that a run read from its store and wrote to it: of cells, and of latents with the inputs."""

    cells: int = 0
    latents: int = 0


@contextmanager
def counted() -> Iterator[Moved]:
    """A scope in which the bytes of all cells and latents are counted."""
    moved = Moved()
    spill, unspill, read, write = UnitFiles.spill, UnitFiles.unspill, LatentFile.read, LatentFile.write

    def spills(self: UnitFiles, *how: Any) -> Any:
        result = spill(self, *how)
        moved.cells += sum(each.size for each in result.files.values())
        return result

    def unspills(self: UnitFiles, *how: Any) -> Any:
        result = unspill(self, *how)
        moved.cells += sum(value.nbytes for tensors in result.values() for value in tensors.values())
        return result

    def reads(self: LatentFile, rows: Any, out: Any) -> None:
        read(self, rows, out)
        moved.latents += out.nbytes

    def writes(self: LatentFile, first: int, rows: Any) -> int:
        moved.latents += rows.nbytes
        return write(self, first, rows)

    with (
        mock.patch.object(UnitFiles, "spill", spills),
        mock.patch.object(UnitFiles, "unspill", unspills),
        mock.patch.object(LatentFile, "read", reads),
        mock.patch.object(LatentFile, "write", writes),
    ):
        yield moved


def slow_factor(name: str, asked: argparse.Namespace, data: DataSet, whole: float) -> float:
    """By what a disk of 50 MB/s makes a run longer: every byte is waited for. Bytes are counted in a few steps."""
    steps, epochs = 4, 2
    with tempfile.TemporaryDirectory() as folder, counted() as moved:
        few = settings(name, asked, placement="stream", epochs=epochs, prefetch=0)
        fit(few, Path(folder) / "run", data=from_first(data, steps * BATCH))
    print(f"{name}: {moved} in {epochs} epochs of {steps} steps", flush=True)
    assert data.train is not None
    longer, again = data.train.rows / (steps * BATCH), asked.epochs / epochs
    schedule = METHODS[name].get("schedule")
    # Layers travel in every step, cells under sequence in every epoch, and otherwise once.
    cells = moved.cells * (again * longer if schedule is None else again if schedule == "sequence" else 1)
    return 1 + (cells + moved.latents * again * longer) / RATE / whole


def from_first(data: DataSet, rows: int) -> DataSet:
    from edgetrain.data.arrays import from_arrays

    assert data.train is not None
    x, y = next(iter(data.train.chunks()))
    return from_arrays((x[:rows], y[:rows]), (x[:BATCH], y[:BATCH]))


if __name__ == "__main__":
    main()
