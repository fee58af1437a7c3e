"""Peak device memory and resident process memory against depth: streamed MF beside `bp`.

Run: python benchmarks/memory_flat.py [--out NAME]

Each point is a process of its own; its resident memory is read from outside, every 5 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

from reporting import highest_rss, publish

CHILD = """
import json, sys
import numpy as np
import edgetrain
width, depth, method, schedule, folder = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
rng = np.random.default_rng(0)
X, y = rng.integers(0, 256, (512, 28, 28), dtype=np.uint8), np.arange(512) % 10
extra = {} if method == "bp" else {"schedule": schedule}
run = edgetrain.fit(f"mlp:{width}x{depth}", ((X, y), (X[:64], y[:64])), method, epochs=2, batch_size=128,
                    placement="stream", run_dir=folder + "/run", **extra)
print(json.dumps(run.record.as_dict()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    asked = parser.parse_args()
    depths = []
    for depth in (2, 4, 8, 16, 32, 64):
        mf, mf_rss = measure(1000, depth, "mf", "separate")
        bp, bp_rss = measure(1000, depth, "bp", "") if depth <= 32 else (None, None)
        depths.append(
            {
                "depth": depth,
                "mf peak MiB": mf["peak_gpu_mb"],
                "mf predicted MiB": mf["predicted_peak_mb"],
                "bp peak MiB": bp and bp["peak_gpu_mb"],
                "mf process MiB": mf_rss,
                "bp process MiB": bp_rss,
            }
        )
        print(depths[-1], flush=True)
    wide = []
    for schedule in ("separate", "sequence"):
        for depth in (3, 40):
            record, rss = measure(2000, depth, "mf", schedule)
            wide.append(
                {"schedule": schedule, "cells of 2000": depth, "peak MiB": record["peak_gpu_mb"], "process MiB": rss}
            )
            print(wide[-1], flush=True)
    publish(
        asked.out,
        "Memory against depth",
        {"Width 1000, batch 128": depths, "Resident memory of the process, width 2000, batch 128": wide},
        "Device memory is live bytes of the device side where there is no GPU; the process includes Python, torch"
        " and, on a CPU run, the device side itself.",
    )


def measure(width: int, depth: int, method: str, schedule: str) -> tuple[dict[str, float], float]:
    """A run's record, and the highest resident memory of its process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, str(width), str(depth), method, schedule, folder]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak = highest_rss(child)
        assert child.stdout is not None
        record = json.loads(child.stdout.read().splitlines()[-1])
        child.wait()
    return record, round(peak / (1 << 20), 1)


if __name__ == "__main__":
    main()
