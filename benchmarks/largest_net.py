"""The largest net that trains under a budget: backpropagation, its remedies, and Mono-Forward, by search.

Run: python benchmarks/largest_net.py [--budget 512] [--out NAME]

The plan decides, with 16 GiB of host memory and 100 GiB of disk beside the device; the search doubles and
bisects, to 1%. What it finds is then really trained for two epochs of two steps on random rows, to see that the
measured peak keeps the budget (except beyond `TRIED` parameters, which would take an hour).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from reporting import publish

import edgetrain
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.training.job import open_job, plan_job

METHODS = ("bp", "bp-checkpoint", "bp-offload", "bp-stream", "mf")
ENOUGH = 1 << 20  # where a search would stop
HOST_MB, DISK_GB = 16384.0, 100.0
TRIED = 300_000_000
ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--out")
    asked = parser.parse_args()
    sections = {}
    for title, spec in (
        ("Deepest mlp:1000xDEPTH", "mlp:1000x{}"),
        ("Widest mlp:WIDTHx2", "mlp:{}x2"),
    ):
        rows = []
        for method in METHODS:
            number = largest(lambda n, method=method, spec=spec: fits(method, spec.format(n), asked.budget))
            rows.append(row(method, spec.format(number), number, asked.budget))
            print(rows[-1], flush=True)
        sections[f"{title}, batch 128, Adam, {asked.budget} MiB of device, 16 GiB of host, 100 GiB of disk"] = rows
    publish(asked.out, f"The largest net under {asked.budget} MiB", sections)


def data() -> Any:
    """Random rows like MNIST's."""
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (ROWS, 28, 28), dtype=np.uint8), np.arange(ROWS) % 10
    return from_arrays((x, y), (x[:32], y[:32]))


def settings(method: str, net: str, budget: int) -> Settings:
    values = {"method": method, "net": net, "epochs": 2, "max_gpu_mb": float(budget), "threads": 1, "device": "cpu"}
    values |= {"max_host_mb": HOST_MB, "max_disk_gb": DISK_GB}
    return Settings().with_values(values)


def fits(method: str, net: str, budget: int) -> bool:
    """Whether the plan takes it."""
    plan = plan_job(open_job(settings(method, net, budget), data=data()))
    return plan.fits and plan.host_fits and plan.disk_fits


def largest(holds: Callable[[int], bool], most: int = ENOUGH) -> int:
    """The largest number up to ``most`` for which something holds that holds for 1."""
    high = 1
    while high < most and holds(2 * high):
        high *= 2
    low, high = high, min(2 * high, most + 1)
    while high - low > max(1, low // 100):  # to 1%
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def row(method: str, net: str, number: int, budget: int) -> dict[str, Any]:
    """The net and, if it is not too large to be tried, its measured peak."""
    job = open_job(settings(method, net, budget), data=data())
    plan = plan_job(job)
    params = sum(cell.params for cell in plan.visits)
    measured = None
    if params <= TRIED:
        with tempfile.TemporaryDirectory() as folder:
            run = edgetrain.fit(
                net, data(), method, epochs=2, max_gpu_mb=float(budget), threads=1, run_dir=Path(folder) / "run"
            )
            measured = run.record.peak_gpu_mb
    return {
        "method": f"`{method}`",
        "largest": number,
        "parameters": f"{params:,}",
        "predicted MiB": round(plan.predicted_peak / (1 << 20), 3),
        "measured MiB": measured,
        "tiles": max(plan.tiles),
        "micro-batch": min(plan.micro_batches),
        "host GiB": round(plan.host_bytes / (1 << 30), 1),
        "disk GiB": round(plan.disk_bytes / (1 << 30), 1),
    }


if __name__ == "__main__":
    main()
