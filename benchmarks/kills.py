"""Real runs killed by SIGKILL at random moments, each resumed to the end: are the files those of a run left alone?

Run: python benchmarks/kills.py [--runs 200] [--seed 0] [--out NAME]

Runs take turns between the schedules and two rules. Each is killed once at a moment drawn evenly from the time that
such a run takes after Python and torch are loaded, then resumed; a resumption may be killed too, as often as not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import publish

from edgetrain.store.run import RunFolder

RUNS = {
    "mf, separate": "--method mf --net mlp:64x3 --epochs 12 --schedule separate",
    "mf, sequence": "--method mf --net mlp:64x3 --epochs 12 --schedule sequence",
    "lbp-dae, separate": "--method lbp-dae --net mlp:48x2 --epochs 8",
    "lbp-dae, sequence": "--method lbp-dae --net mlp:48x2 --epochs 8 --schedule sequence",
}
COMMON = "--data digits --batch-size 32 --threads 1 --device cpu --checkpoint-every 0.05 --quiet"
_LEAVE_ALONE = 4  # resumptions, before the run may end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    asked = parser.parse_args()
    draw, rows = random.Random(asked.seed), []
    for number, (name, flags) in enumerate(RUNS.items()):
        runs = asked.runs // len(RUNS) + (number < asked.runs % len(RUNS))
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"run": name, **tried(flags, runs, draw, Path(folder))})
        print(rows[-1], flush=True)
    publish(asked.out, "Runs killed at random moments and resumed", {f"edgetrain fit {COMMON}": rows})
    if any(row["other hashes"] or row["lost"] for row in rows):
        raise SystemExit("a run was lost")


def tried(flags: str, runs: int, draw: random.Random, folder: Path) -> dict[str, int]:
    """What became of runs that were killed."""
    began = time.monotonic()
    alone = started(flags, folder / "alone")
    loaded = waited_for(folder / "alone", began)
    alone.wait()
    taken, expected = time.monotonic() - began, hash_of(folder / "alone")
    found = {"runs": 0, "kills": 0, "with a commit": 0, "same hash": 0, "other hashes": 0, "lost": 0}
    while found["runs"] < runs:
        path = folder / str(found["runs"])
        for resumed in range(_LEAVE_ALONE + 1):
            child = started(flags, path)
            last = resumed == _LEAVE_ALONE or (resumed and draw.random() < 0.5)
            if not last:
                try:
                    child.wait(draw.uniform(loaded, taken))
                except subprocess.TimeoutExpired:
                    os.kill(child.pid, signal.SIGKILL)
                    found["kills"] += 1
                    found["with a commit"] += path.is_dir() and RunFolder(path).last() is not None
            if child.wait() != -signal.SIGKILL:
                break
        found["runs"] += 1
        if child.returncode:
            found["lost"] += 1
        else:
            found["same hash" if hash_of(path) == expected else "other hashes"] += 1
    return found


def started(flags: str, path: Path) -> subprocess.Popen[bytes]:
    words = [*flags.split(), *COMMON.split(), "--run-dir", str(path), "--resume"]
    return subprocess.Popen([sys.executable, "-m", "edgetrain", "fit", *words], stdout=subprocess.DEVNULL)


def waited_for(path: Path, began: float) -> float:
    """Seconds until a run's folder was there."""
    while not path.exists():
        time.sleep(0.01)
    return time.monotonic() - began


def hash_of(path: Path) -> str:
    """Of the model and of every cell's file, optimizers included."""
    files = [path / "model.safetensors", *sorted((path / "cells").iterdir())]
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    main()
