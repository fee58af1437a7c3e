"""Two checkouts side by side: time, peak memory, files and bytes of the same runs, and whether weights are equal.

Run: EDGETRAIN_DATA=... python benchmarks/two_versions.py BEFORE AFTER [--repeat 5] [--out NAME]

BEFORE and AFTER are checkouts, each with a virtual environment in ``.venv``. Runs of both alternate; times are
medians, and their ratio is after / before.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import publish
from safetensors.torch import load_file

COMMON = "--epochs 2 --threads 1 --batch-size 128 --seed 3"
RUNS = {
    "mf, streamed": "--data mnist --net mlp:500x2 --method mf --placement stream",
    "mf, sequence, uint8": "--data mnist --net mlp:500x2 --method mf --schedule sequence --latent-dtype uint8",
    "mf, images, augmented": "--data cifar10 --net cnn:16,32 --method mf --schedule sequence --augment crop,flip",
    "ff": "--data mnist --net mlp:500x2 --method ff",
    "lbp-dae": "--data mnist --net mlp:500x2 --method lbp-dae",
    "lbp-gan (two optimizers)": "--data mnist --net mlp:300 --method lbp-gan",
    "sll": "--data mnist --net mlp:500x2 --method sll",
    "bp": "--data mnist --net mlp:500x2 --method bp",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out")
    asked = parser.parse_args()
    rows = []
    for name, flags in RUNS.items():
        seconds: dict[str, list[float]] = {"before": [], "after": []}
        kept: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for number in range(asked.repeat):
                for which in ("before", "after") if number % 2 else ("after", "before"):
                    path = Path(folder) / f"{which}{number}"
                    record = run(getattr(asked, which), f"fit {flags} {COMMON} --quiet --run-dir {path}")
                    seconds[which].append(record["seconds"])
                    kept[which] = record | {"files": files_of(path), "cells": cells_of(path)}
        before, after = kept["before"], kept["after"]
        times = {which: statistics.median(values) for which, values in seconds.items()}
        rows.append(
            {
                "run": name,
                "s before": round(times["before"], 2),
                "s after": round(times["after"], 2),
                "ratio": round(times["after"] / times["before"], 3),
                "peak MiB": f"{before['peak_gpu_mb']:.3f} / {after['peak_gpu_mb']:.3f}",
                "host MiB": f"{before['peak_host_mb']:.0f} / {after['peak_host_mb']:.0f}",
                "disk MiB": f"{before['disk_mb']:.2f} / {after['disk_mb']:.2f}",
                "written MiB": f"{before['written_mb']:.2f} / {after['written_mb']:.2f}",
                "files": f"{before['files']} / {after['files']}",
                "cells' weights": "equal" if equal(before["cells"], after["cells"]) else "differ",
            }
        )
        print(rows[-1], flush=True)
    publish(asked.out, "Two versions side by side", {"before / after": rows}, f"Runs: `{COMMON}`, {asked.repeat} each.")


def run(checkout: Path, words: str) -> dict[str, Any]:
    command = [str(checkout.resolve() / ".venv" / "bin" / "python"), "-m", "edgetrain", *shlex.split(words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def files_of(path: Path) -> int:
    return sum(1 for file in path.rglob("*") if file.is_file())


def cells_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(path / "model.safetensors").items() if name[:3].isdigit()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    main()
