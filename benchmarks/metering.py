"""What measuring costs: the time of a run with the meter off, as it is by default, and watching every step.

Run: EDGETRAIN_DATA=... python benchmarks/metering.py [--out NAME] [--rounds 5]

By default the meter of a CPU run watches the first two steps of each kind in a cell's first two visits, because all
others are the same program; ``--meter full`` watches all. The three take turns within one process; ratios are those
of the medians. Every run also keeps its timeline and compares itself with backpropagation, by dry runs that cost the
same whatever the run's length: those seconds stand apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from reporting import publish

from edgetrain.config import resolve
from edgetrain.memory.meter import LiveMeter
from edgetrain.planning import timelines
from edgetrain.planning.planner import backprop_peak
from edgetrain.training import fit as fitting
from edgetrain.training.job import open_job, plan_job

RUNS = {
    "mlp:300x2, MNIST, 1 epoch": {"data": "mnist", "net": "mlp:300x2", "epochs": 1},
    "mlp:1000x2, MNIST, 1 epoch": {"data": "mnist", "net": "mlp:1000x2", "epochs": 1},
    "cnn:8,16, digits, 4 epochs": {"data": "digits", "net": "cnn:8,16", "epochs": 4},
}


class Off(LiveMeter):
    """Watches nothing."""

    def watch(self, kind: Any = None) -> Any:
        """See ``Meter.watch``."""
        return nullcontext()


METERS = {"off": lambda: Off(), "default": lambda: LiveMeter(False), "full": lambda: LiveMeter(True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    asked = parser.parse_args()
    rows = [{"run": name, **compared(given, asked.rounds)} for name, given in RUNS.items()]
    publish(asked.out, "What measuring costs", {"Training, medians of seconds": rows})


def compared(given: dict[str, Any], rounds: int) -> dict[str, Any]:
    settings = resolve({"method": "mf", "threads": 1, "device": "cpu", **given}, None)
    taken: dict[str, list[float]] = {name: [] for name in METERS}
    for _ in range(rounds + 1):
        for name, meter in METERS.items():
            with (
                tempfile.TemporaryDirectory() as folder,
                mock.patch.object(fitting, "meter_of", lambda device, full, made=meter: made()),
            ):
                record = fitting.fit(settings, Path(folder) / "run").record
            taken[name].append(sum(cell.seconds for cell in record.cells))
    medians = {name: median(seconds[1:]) for name, seconds in taken.items()}  # the first round warms up
    job = open_job(settings)
    plan, began = plan_job(job), time.perf_counter()
    timelines.of_run(job.work, plan)
    timelines.of_backpropagation(job.work, job.net)
    backprop_peak(job.work, job.net)
    return {
        **medians,
        "default / off": medians["default"] / medians["off"],
        "full / off": medians["full"] / medians["off"],
        "timelines, once a run": time.perf_counter() - began,
    }


if __name__ == "__main__":
    main()
