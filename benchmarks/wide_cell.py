"""A dense cell of more than four times the budget: trained in tiles, beside the same run untiled.

Run: EDGETRAIN_DATA=... python benchmarks/wide_cell.py [--rows 4096] [--width 24000] [--budget 64] [--out NAME]

The cell's weights, gradients and Adam's moments take at least 256 MiB; the budget is 64 MiB. Both runs see the
same MNIST rows in the same order. Tiles pass the forward product twice, so arithmetic alone says 1.5 times
the time for mf and sll, and the weights and moments of every tile come from the host and go back in each step.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from reporting import edgetrain, publish

from edgetrain.data.specs import open_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=24000)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--out")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = excerpt(asked.rows, Path(folder) / "mnist.npz")
        for method, lr in (("mf", 1e-3), ("sll", 1e-3), ("lbp-ae", 1e-3), ("ff", 1e-4)):
            whole = run(data, method, asked.width, None, Path(folder) / f"{method}-whole", lr)
            tiled = run(data, method, asked.width, asked.budget, Path(folder) / f"{method}-tiled", lr)
            cell, plain = tiled["cells"][0], whole["cells"][0]
            rows.append(
                {
                    "method": f"`{method}`",
                    "untiled peak MiB": plain["peak_gpu_mb"],
                    "budget MiB": asked.budget,
                    "peak MiB": tiled["peak_gpu_mb"],
                    "predicted MiB": tiled["predicted_peak_mb"],
                    "tiles": cell["tiles"],
                    "micro-batch": cell["micro_batch"],
                    "untiled accuracy": whole["test_accuracy"],
                    "accuracy": tiled["test_accuracy"],
                    "time over untiled": round(cell["seconds"] / plain["seconds"], 2),
                }
            )
            print(rows[-1], flush=True)
    title = f"One cell of {asked.width} units on {asked.rows} MNIST rows, one epoch, batch 128"
    publish(asked.out, title, {"edgetrain fit --net mlp:WIDTH --threads 1": rows})


def excerpt(rows: int, path: Path) -> Path:
    """The first training rows and 1000 test rows of MNIST."""
    opened = open_data("mnist")
    arrays: dict[str, Any] = {}
    for name, part, count in (("train", opened.train, rows), ("test", opened.test, 1000)):
        assert part is not None
        chunks = list(part.chunks())
        arrays[f"x_{name}"] = np.concatenate([x for x, _ in chunks])[:count]
        arrays[f"y_{name}"] = np.concatenate([y for _, y in chunks])[:count]
    np.savez(path, **arrays)
    return path


def run(data: Path, method: str, width: int, budget: int | None, folder: Path, lr: float) -> dict[str, Any]:
    """The record of one epoch."""
    limit = "" if budget is None else f"--max-gpu-mb {budget}"
    flags = f"--data {data} --net mlp:{width} --epochs 1 --method {method} --lr {lr} --threads 1 --quiet {limit}"
    return edgetrain(f"fit {flags} --run-dir {folder}")


if __name__ == "__main__":
    main()
