"""Training on a data set that is larger than `--max-host-mb`: how far the process grows.

Run: python benchmarks/host_memory.py [--rows 120000] [--max-host-mb 128] [--out NAME]

The data set is made on disk in pieces (float32 images, 3 KiB a row). Growth is measured over the
process's resident memory after `import torch` and one step of an optimizer, which imports torch's
compiler (about 75 MiB) whatever calls it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import psutil
from reporting import highest_rss, publish

CHILD = """
import sys
import torch
layer = torch.nn.Linear(2, 2)
optimizer = torch.optim.Adam(layer.parameters(), fused=True)
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
print("ready", flush=True)
sys.stdin.readline()
import json
import edgetrain
run = edgetrain.fit("mlp:256x2", sys.argv[1], epochs=1, batch_size=128, schedule=sys.argv[4],
                    max_host_mb=float(sys.argv[2]), run_dir=sys.argv[3])
print(json.dumps(run.record.as_dict()), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--max-host-mb", type=float, default=128.0)
    parser.add_argument("--out")
    asked = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "large.npz"
        size = make(data, asked.rows)
        for schedule in ("separate", "sequence"):
            record, start, peak = measure(data, asked.max_host_mb, Path(folder) / schedule, schedule)
            table.append(
                {
                    "schedule": schedule,
                    "data set MiB": size / 2**20,
                    "max-host-mb": asked.max_host_mb,
                    "grown by MiB": (peak - start) / 2**20,
                    "of that device side MiB": record["peak_gpu_mb"],
                    "latents MiB": record["latents_mb"],
                    "seconds": record["seconds"],
                }
            )
    publish(asked.out, "Host memory against the data set's size", {"mlp:256x2, one epoch": table})


def make(path: Path, rows: int, piece: int = 4096) -> int:
    """An uncompressed .npz written piece by piece; returns its bytes."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, shape in (("x_train", (rows, 1, 28, 28)), ("x_test", (1000, 1, 28, 28))):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for first in range(0, shape[0], piece):
                    count = min(piece, shape[0] - first)
                    file.write(rng.random((count, *shape[1:]), dtype=np.float32).tobytes())
        for name, count in (("y_train", rows), ("y_test", 1000)):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.arange(count) % 10)
    return path.stat().st_size


def measure(data: Path, limit: float, folder: Path, schedule: str) -> tuple[dict[str, float], int, int]:
    """The run's record, and resident bytes at its start and at their highest."""
    command = [sys.executable, "-c", CHILD, str(data), str(limit), str(folder), schedule]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.readline()
    start = psutil.Process(child.pid).memory_info().rss
    child.stdin.write("go\n")
    child.stdin.flush()
    peak = highest_rss(child)
    return json.loads(child.stdout.read().splitlines()[-1]), start, peak


if __name__ == "__main__":
    main()
