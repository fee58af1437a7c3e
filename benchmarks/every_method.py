"""Every method on the same data, several seeds, next to backpropagation on the same net.

Run: EDGETRAIN_DATA=... python benchmarks/every_method.py --plan digits|mnist|mnist-longer [--seeds 3] [--out NAME]

Each row is `edgetrain fit` with the flags shown and no other choice: optimizer, rate, schedule and vote are
the method's defaults, and nothing is chosen on test data. `slp`, the linear classifier, is the floor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

from reporting import edgetrain, publish

DENSE = [
    *("mf", "lbp-ae", "lbp-dae", "lbp-gan", "ff", "symba", "sll", "predsim"),
    *("slp", "bp", "bp-checkpoint", "bp-offload", "fa", "dfa"),
]
IMAGES = ["lbp-cae", "mf", "predsim", "bp"]
TOKENS = ["sll+", "bp"]
PLANS: dict[str, list[tuple[list[str], str]]] = {
    "digits": [
        (DENSE, "--net mlp:256x2 --epochs 30 --batch-size 64"),
        (IMAGES, "--net cnn:32,64 --epochs 30 --batch-size 64"),
        (TOKENS, "--net vit:depth=3,width=48,heads=4,patch=2 --epochs 30 --batch-size 64"),
    ],
    "mnist": [
        (DENSE, "--net mlp:300x2 --epochs 3 --batch-size 128 --threads 1"),
        (IMAGES, "--net cnn:16,32 --epochs 1 --batch-size 128 --threads 1"),
        (TOKENS, "--net vit:depth=2,width=48,heads=4,patch=7 --epochs 1 --batch-size 128 --threads 1"),
    ],
    "mnist-longer": [  # rules that three epochs do not do justice to
        (["slp", "ff", "symba"], "--net mlp:300x2 --epochs 10 --batch-size 128 --threads 1"),
        (
            ["lbp-ae", "lbp-dae", "lbp-gan"],
            "--net mlp:1024x2 --epochs 5 --classifier-epochs 30 --batch-size 128 --threads 1",
        ),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=PLANS, default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only methods that hold this word")
    parser.add_argument("--out")
    asked = parser.parse_args()
    sections = {}
    data = asked.plan.partition("-")[0]
    for methods, flags in PLANS[asked.plan]:
        rows = []
        for method in methods:
            if asked.only in method:
                rows.append(measure(method, f"--data {data} {flags}", asked.seeds))
                print(rows[-1], flush=True)
        if rows:
            sections[f"edgetrain fit --data {data} {flags} --method ..."] = rows
    publish(asked.out, f"Every method on {data}", sections)


def measure(method: str, flags: str, seeds: int) -> dict[str, object]:
    """Figures of one method over its seeds."""
    like = " --like lbp-cae" if method == "bp" and "cnn:" in flags else ""
    records = [run(f"{flags} --method {method}{like} --seed {seed}") for seed in range(seeds)]
    accuracies = [record["test_accuracy"] for record in records]
    worst = max(records, key=lambda record: record["peak_gpu_mb"])
    return {
        "method": f"`{method}`",
        "test accuracy": f"{statistics.mean(accuracies):.4f}",
        "seeds": ", ".join(f"{accuracy:.4f}" for accuracy in accuracies),
        "peak MiB": worst["peak_gpu_mb"],
        "predicted MiB": worst["predicted_peak_mb"],
        "seconds": round(statistics.mean(record["seconds"] for record in records), 1),
    }


def run(flags: str) -> dict[str, Any]:
    """The record of one run."""
    with tempfile.TemporaryDirectory() as folder:
        return edgetrain(f"fit {flags} --quiet --run-dir {folder}/run")


if __name__ == "__main__":
    main()
