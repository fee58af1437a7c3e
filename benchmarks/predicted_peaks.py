"""Predicted against measured peak device memory: every objective, net, schedule and way to cut a step.

Run: python benchmarks/predicted_peaks.py [--out NAME]

Real runs on random rows, every step metered (`--meter full`); the prediction comes from the plan alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from reporting import publish

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet, Part
from edgetrain.errors import EdgetrainError
from edgetrain.training.fit import fit
from edgetrain.training.methods import METHODS
from edgetrain.units import MIB

ROWS, CLASSES, VOCABULARY = 300, 10, 1000  # a last batch of 44 rows
NETS = {
    "mlp:400x3": "grey",
    "mlp:400x2;norm=batch;dropout=0.2": "grey",
    "lcmlp:4,8": "grey",
    "mlp:100;embedding=50": "text",
    "cnn:16,32": "colour",
    "cnn:16,32;pool=max;norm=batch": "colour",
    "vgg8b:0.125": "colour",
    "vit:depth=3,width=48,heads=4,patch=8": "colour",
}
WAYS: list[dict[str, Any]] = [
    {"schedule": "separate"},
    {"schedule": "sequence"},
    {"schedule": "separate", "micro_batch": 48},
    {"schedule": "separate", "tiles": 3},
    {"schedule": "sequence", "placement": "resident"},
]
BASELINE_WAYS: list[dict[str, Any]] = [{}, {"micro_batch": 48}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    asked = parser.parse_args()
    rows, refused = [], []
    for method, kind in METHODS.items():
        for net, data in NETS.items():
            if (method == "slp" and net != "mlp:400x3") or (method.startswith("lbp-") and net.startswith("vgg")):
                continue  # slp takes no net; dense decoders of a VGG's maps take gigabytes
            for way in BASELINE_WAYS if kind.defaults.schedule is None else WAYS:
                try:
                    rows.append(measure(method, net, data_of(data), way))
                except EdgetrainError as error:
                    refused.append(f"{method} on {net}{words(way)}: {error}")
                    continue
                print(rows[-1], flush=True)
    worst = max(rows, key=lambda row: abs(row["off by bytes"]))
    notes = f"{len(rows)} runs; the prediction is off by at most {abs(worst['off by bytes'])} bytes.\n\n"
    notes += "Refused, as it should be:\n\n" + "\n".join(f"- {line}" for line in refused)
    publish(asked.out, "Predicted and measured peaks", {"batch 128, two epochs, Adam": rows}, notes)


def words(way: dict[str, Any]) -> str:
    """A way, as flags."""
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in way.items())


def measure(method: str, net: str, data: DataSet, way: dict[str, Any]) -> dict[str, Any]:
    """One run's highest visit."""
    values = {"method": method, "net": net, "epochs": 2, "device": "cpu", "threads": 1, "meter": "full", **way}
    with tempfile.TemporaryDirectory() as folder:
        record = fit(Settings().with_values(values), Path(folder) / "run", data=data).record
    assert record.peak_gpu_mb is not None
    assert record.predicted_peak_mb is not None
    return {
        "method": f"`{method}`",
        "net": f"`{net}`",
        "flags": words(way),
        "predicted MiB": record.predicted_peak_mb,
        "measured MiB": record.peak_gpu_mb,
        "off by bytes": round((record.predicted_peak_mb - record.peak_gpu_mb) * MIB),
    }


def data_of(kind: str) -> DataSet:
    """Random rows of a kind."""
    draw = np.random.default_rng(0)
    y = np.arange(ROWS + 40) % CLASSES
    if kind == "text":
        ids = draw.integers(0, VOCABULARY, (ROWS + 40, 64)).astype(np.int64)
        train = Part(ROWS, lambda: iter([(ids[:ROWS], y[:ROWS])]), "random")
        test = Part(40, lambda: iter([(ids[ROWS:], y[ROWS:])]), "random")
        names = tuple(map(str, range(CLASSES)))
        return DataSet("random", (64,), None, "tokens", CLASSES, train, test, names, VOCABULARY)
    shape = (28, 28) if kind == "grey" else (3, 32, 32)
    x = draw.integers(0, 256, (ROWS + 40, *shape), dtype=np.uint8)
    return from_arrays((x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]))


if __name__ == "__main__":
    main()
