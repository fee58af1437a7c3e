"""Training beside a program that keeps one core busy, against training alone.

Run: EDGETRAIN_DATA=... python benchmarks/shared_cores.py [--repeats 3] [--out NAME]

The same runs under each way in which OpenMP's threads may wait: `spinning` is torch's own default (before),
`sleeping` is what edgetrain sets, `spins N` lets them spin for N rounds first. The policies take turns. Best of
the repeats alone, median of them beside the busy process; the weights' hashes must all be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reporting import publish

# A variable of another OpenMP library keeps edgetrain from setting a policy, and means nothing to torch's.
POLICIES = {
    "spinning": {"KMP_BLOCKTIME": "200"},
    "spins 1000": {"GOMP_SPINCOUNT": "1000"},
    "spins 10000": {"GOMP_SPINCOUNT": "10000"},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
}
RUNS = {
    "quickstart": "",
    "mnist 2x1000, 2 epochs": "--data mnist --net mlp:1000x2 --epochs 2",
}
LIMIT_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    asked = parser.parse_args()
    seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    hashes: dict[str, set[str]] = defaultdict(set)
    for repeat in range(asked.repeats):
        for run, flags in RUNS.items():
            for policy in POLICIES:
                if policy == "spinning" and run != "quickstart" and repeat:
                    continue  # once is enough of the slowest
                for side in ("alone", "busy"):
                    with neighbour(side == "busy"):
                        took, digest = train(flags, POLICIES[policy])
                    seconds[run, policy, side].append(took)
                    hashes[run].add(digest)
                    print(run, policy, side, round(took, 1), flush=True)
    rows = [row(run, policy, seconds) for run in RUNS for policy in POLICIES]
    assert all(len(found) == 1 for found in hashes.values()), hashes
    publish(asked.out, "Training on shared cores", {"One core kept busy by another program": rows})


def row(run: str, policy: str, seconds: dict[tuple[str, str, str], list[float]]) -> dict[str, object]:
    """Figures of one run under one policy."""
    alone = min(seconds[run, policy, "alone"])
    busy = statistics.median(seconds[run, policy, "busy"])
    return {
        "run": run,
        "threads that wait": policy,
        "alone s": round(alone, 2),
        "busy s": round(busy, 2),
        "busy / alone": round(busy / alone, 2),
        "alone / alone spinning": round(alone / min(seconds[run, "spinning", "alone"]), 2),
    }


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """Another program that computes without end."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def train(flags: str, policy: dict[str, str]) -> tuple[float, str]:
    """Seconds of a run, as it reports them, and the hash of its model."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgetrain", "fit", *flags.split(), "--quiet", "--json", "--run-dir"]
        done = subprocess.run(
            [*command, f"{folder}/run"],
            env={**kept, **policy},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=True,
        )
        cells = sorted(Path(folder).glob("run/cells/*"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in cells)).hexdigest()
    return json.loads(done.stdout)["seconds"], digest


if __name__ == "__main__":
    main()
