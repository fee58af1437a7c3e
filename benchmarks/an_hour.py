"""A run of an hour at full speed: resident memory, open files and threads, and the device's peak, must not creep.

Run: EDGETRAIN_DATA=... python benchmarks/an_hour.py [--minutes 60] [--out NAME]

The run is watched from outside, twice a second. `creep` is the slope by least squares after a tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from reporting import publish

from edgetrain.units import MIB

FLAGS = (
    "--data mnist --net mlp:200x4 --schedule sequence --epochs 4000 --batch-size 128 --threads 1 --max-gpu-mb 8"
    " --checkpoint-every 20"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        limit = ["--time-limit", str(60 * asked.minutes), "--quiet", "--run-dir", str(run)]
        child = subprocess.Popen([sys.executable, "-m", "edgetrain", "fit", *FLAGS.split(), *limit])
        seen = watched(child)
        entries = [json.loads(line)["entry"] for line in (run / "journal.jsonl").read_text().splitlines()]
        checkpoints = [entry for entry in entries if "cells" in entry]
        peaks = [max(cell["peak_gpu_mb"] for cell in entry["cells"] if cell["peak_gpu_mb"]) for entry in checkpoints]
        disk = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    if child.returncode != 143:
        raise SystemExit(f"ended with {child.returncode}")
    after = seen[len(seen) // 10 :]
    rows = [row(name, after, column) for column, name in enumerate(("resident MiB", "open files", "threads"), 1)]
    of_peaks = {"first": peaks[0], "last": peaks[-1], "least": min(peaks), "most": max(peaks)}
    rows.append({"what": "device MiB, at checkpoints", **of_peaks, "creep in an hour": None})
    last = checkpoints[-1]
    seconds, written = last["totals"]["seconds"], last["totals"]["written"] / MIB
    notes = (
        f"{last['visits']} visits of {last['cells'][0]['epochs']} epochs in {seconds:.0f} s, {len(checkpoints)}"
        f" checkpoints, {written:.0f} MiB written; the run folder holds {disk / MIB:.1f} MiB at the end."
    )
    publish(asked.out, f"A run of {asked.minutes:g} minutes", {f"edgetrain fit {FLAGS}": rows}, notes)


def watched(child: subprocess.Popen[bytes]) -> np.ndarray:
    """Seconds, resident MiB, open files and threads of a process until it ends, [samples, 4]."""
    process, began, found = psutil.Process(child.pid), time.monotonic(), []
    while child.poll() is None:
        try:
            memory = process.memory_info().rss / MIB
            found.append((time.monotonic() - began, memory, process.num_fds(), process.num_threads()))
        except psutil.Error:  # it ended between the two looks
            break
        time.sleep(0.5)
    child.wait()
    return np.array(found)


def row(name: str, seen: np.ndarray, column: int) -> dict[str, object]:
    values = seen[:, column]
    tenth = max(1, len(values) // 10)
    return {
        "what": name,
        "first": round(float(np.median(values[:tenth])), 1),
        "last": round(float(np.median(values[-tenth:])), 1),
        "least": round(float(values.min()), 1),
        "most": round(float(values.max()), 1),
        "creep in an hour": round(float(np.polyfit(seen[:, 0] / 3600, values, 1)[0]), 2),
    }


if __name__ == "__main__":
    main()
