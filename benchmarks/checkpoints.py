"""What checkpoints cost: their share of a run's time, by default and when they are asked for often.

Run: EDGETRAIN_DATA=... python benchmarks/checkpoints.py [--out NAME]

By default they are to take less than 3%.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from reporting import edgetrain, publish

RUNS = [
    "--data mnist --net mlp:1000x2 --epochs 10 --threads 1",
    "--data mnist --net mlp:1000x2 --epochs 10 --threads 1 --schedule sequence",
    "--data mnist --net mlp:1000x2 --epochs 3 --threads 1 --checkpoint-every 10",
    "--data mnist --net mlp:1000x2 --epochs 3 --threads 1 --schedule sequence --checkpoint-every 10",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, flags in enumerate(RUNS):
            run = edgetrain(f"fit {flags} --quiet --run-dir {folder}/{number}")
            lines = (Path(folder) / str(number) / "journal.jsonl").read_text().splitlines()
            checkpoints = [entry for entry in (json.loads(line)["entry"] for line in lines) if "cells" in entry]
            rows.append(
                {
                    "flags": f"`{flags}`",
                    "seconds": round(run["seconds"], 1),
                    "checkpoints": len(checkpoints) - 1,  # the last finishes the run
                    "with latents": sum("latents" in entry for entry in checkpoints),
                    "checkpoint seconds": run["checkpoint_seconds"],
                    "share": round(run["checkpoint_seconds"] / run["seconds"], 4),
                    "written MiB": run["written_mb"],
                }
            )
            print(rows[-1], flush=True)
    publish(asked.out, "The cost of checkpoints", {"edgetrain fit": rows})


if __name__ == "__main__":
    main()
