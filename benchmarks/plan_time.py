"""Times that the plan tells against times that runs take.

Run: EDGETRAIN_DATA=... python benchmarks/plan_time.py [--out NAME]

`edgetrain doctor` measures the machine first. A run's time is that of its visits, without preparing the data.
"""

from __future__ import annotations

import argparse
import os
import tempfile

from reporting import edgetrain, publish

RUNS = [
    "--data mnist --net mlp:1000x2 --epochs 2",
    "--data mnist --net mlp:1000x2 --epochs 2 --schedule sequence",
    "--data mnist --net mlp:1000x2 --epochs 2 --method bp",
    "--data mnist --net mlp:1000x2 --epochs 2 --micro-batch 16",
    "--data mnist --net mlp:2000 --epochs 1 --tiles 4",
    "--data mnist --net mlp:300x2 --epochs 2 --method lbp-ae",
    "--data mnist --net mlp:300x2 --epochs 2 --method ff",
    "--data mnist --net mlp:300x2 --epochs 2 --method sll",
    "--data mnist --net cnn:16,32 --epochs 1 --method mf",
    "--data digits --net mlp:256x2 --epochs 30 --batch-size 64",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        edgetrain("doctor", environment)
        for number, flags in enumerate(RUNS):
            plan = edgetrain(f"plan {flags}", environment)
            run = edgetrain(f"fit {flags} --quiet --run-dir {folder}/{number}", environment)
            cells = [*run["cells"], *([run["classifier"]] if run.get("classifier") else [])]
            seconds = sum(cell["seconds"] for cell in cells)
            rows.append(
                {
                    "flags": f"`{flags}`",
                    "planned s": plan["seconds"],
                    "measured s": round(seconds, 1),
                    "planned over measured": round(plan["seconds"] / seconds, 2),
                    "bound": ", ".join(dict.fromkeys(cell["bound"] for cell in plan["cells"])),
                }
            )
            print(rows[-1], flush=True)
    publish(asked.out, "Planned and measured times", {"edgetrain plan and edgetrain fit": rows})


if __name__ == "__main__":
    main()
