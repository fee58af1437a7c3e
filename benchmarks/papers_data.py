"""Accuracy, peak memory and disk on the data sets of the papers, by the command that a user types.

Run: EDGETRAIN_DATA=... python benchmarks/papers_data.py [--only WORD] [--out NAME]

The vote behind `accuracy` is fixed by the method and never chosen on test data; epochs are those of the
commands, far fewer than the papers'.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile

from reporting import publish

MNIST = "--data mnist --net mlp:1000x2 --epochs 5 --batch-size 128"
RUNS = [
    f"{MNIST} --method mf --schedule separate --max-gpu-mb 64",
    f"{MNIST} --method mf --schedule separate --max-gpu-mb 64 --seed 1",
    f"{MNIST} --method mf --schedule separate --max-gpu-mb 64 --latent-dtype uint8",
    f"{MNIST} --method mf --schedule separate --max-gpu-mb 64 --latent-dtype uint8 --seed 1",
    f"{MNIST} --method mf --schedule sequence --max-gpu-mb 64",
    f"{MNIST} --method bp",
    "--data mnist --net mlp:1024/3 --method lbp-ae --epochs 5 --classifier-epochs 30 --batch-size 512 --max-gpu-mb 64",
    "--data mnist --net mlp:1024/3 --method lbp-dae --epochs 5 --classifier-epochs 30 --batch-size 512 --max-gpu-mb 64",
    "--data fashion-mnist --net mlp:1000x2 --method mf --epochs 5 --max-gpu-mb 64",
    "--data fashion-mnist --net mlp:1000x2 --method bp --epochs 5",
    "--data cifar10 --net cnn:64,128,256,512 --method mf --epochs 1 --latent-dtype uint8 --max-gpu-mb 256",
    "--data breast-cancer --net mlp:100x2 --method mf --epochs 60 --batch-size 32",
    "--data breast-cancer --net mlp:100x2 --method bp --epochs 60 --batch-size 32",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run only commands that hold this word")
    parser.add_argument("--out")
    asked = parser.parse_args()
    rows = []
    for flags in RUNS:
        if asked.only in flags:
            rows.append(measure(flags))
            print(rows[-1], flush=True)
    publish(asked.out, "The papers' data", {"edgetrain fit ...": rows})


def measure(flags: str) -> dict[str, object]:
    """One run's figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgetrain", "fit", *shlex.split(flags), "--json", "--quiet"]
        done = subprocess.run([*command, "--run-dir", f"{folder}/run"], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"command": flags, "accuracy": done.stderr.strip()}
    record = json.loads(done.stdout)
    return {
        "command": f"`{flags}`",
        "accuracy": f"{record['test_accuracy']:.4f}",
        "peak MiB": record["peak_gpu_mb"],
        "predicted MiB": record["predicted_peak_mb"],
        "latents MiB": record["latents_mb"],
        "disk MiB": record["disk_mb"],
    }


if __name__ == "__main__":
    main()
