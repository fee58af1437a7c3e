"""The largest net that trains under a budget: backpropagation, its two remedies, and Mono-Forward, by search.

Run: python benchmarks/largest_net.py [--budget 512] [--out NAME]

The plan's predicted peak decides; it doubles and bisects. The largest net that a table shows is then really
trained for two epochs of two steps on random rows, to see that the measured peak keeps the budget (except
beyond `TRIED` parameters, which take the host's memory and an hour).
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

METHODS = ("bp", "bp-checkpoint", "bp-offload", "mf")
ENOUGH = 1 << 14  # where the search for depth stops
WIDEST = 1 << 22
TRIED = 300_000_000
ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--out")
    asked = parser.parse_args()
    sections = {}
    for title, spec, most in (
        ("Deepest mlp:1000xDEPTH", "mlp:1000x{}", ENOUGH),
        ("Widest mlp:WIDTHx2", "mlp:{}x2", WIDEST),
    ):
        rows = []
        for method in METHODS:
            number = largest(lambda n, method=method, spec=spec: fits(method, spec.format(n), asked.budget), most)
            rows.append(row(method, spec.format(number), number, most, asked.budget))
            print(rows[-1], flush=True)
        sections[f"{title}, batch 128, Adam, {asked.budget} MiB"] = rows
    publish(asked.out, f"The largest net under {asked.budget} MiB", sections)


def data() -> Any:
    """Random rows like MNIST's."""
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (ROWS, 28, 28), dtype=np.uint8), np.arange(ROWS) % 10
    return from_arrays((x, y), (x[:32], y[:32]))


def settings(method: str, net: str, budget: int) -> Settings:
    values = {"method": method, "net": net, "epochs": 2, "max_gpu_mb": float(budget), "threads": 1, "device": "cpu"}
    return Settings().with_values(values)


def fits(method: str, net: str, budget: int) -> bool:
    """Whether the plan takes it."""
    return plan_job(open_job(settings(method, net, budget), data=data())).fits


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` for which something holds that holds for 1."""
    high = 1
    while high < most and holds(2 * high):
        high *= 2
    low, high = high, min(2 * high, most + 1)
    while high - low > max(1, low // 100):  # to 1%
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def row(method: str, net: str, number: int, most: int, budget: int) -> dict[str, Any]:
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
        "largest": f"{number} (the search ends there)" if number >= most else str(number),
        "parameters": f"{params:,}",
        "predicted MiB": round(plan.predicted_peak / (1 << 20), 3),
        "measured MiB": measured,
        "tiles": max(plan.tiles),
        "micro-batch": min(plan.micro_batches),
    }


if __name__ == "__main__":
    main()
