"""The Mono-Forward paper's Figure 3a: peak device memory against depth, layers of 1000 units, full-batch MNIST.

Run: EDGETRAIN_DATA=... python benchmarks/memory_curves.py [--out NAME]

The paper trains on 50,000 rows at once and gives slopes in MB = 1e6 bytes: backpropagation 204.00, Mono-Forward with
all cells resident 16.16, "theoretically constant" if one were streamed. Up to 5 layers it is measured here, beyond
that predicted; that both agree wherever both exist is what the first table shows.
"""

from __future__ import annotations

import argparse
from typing import Any

from reporting import edgetrain, publish

WIDTH, ROWS = 1000, 50_000
PAPER = {"bp": 204.00, "mf": None, "mf, all resident": 16.16}  # MB; it did not stream cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    asked = parser.parse_args()
    flags = f"profile --data mnist --methods mf,bp --widths {WIDTH} --batch-size {ROWS} --threads 1"
    measured = edgetrain(f"{flags} --depths 2,3,5")
    predicted = edgetrain(f"{flags} --depths 2,5,10,20,100,1000 --dry")
    resident = [(depth, resident_peak(depth)) for depth in (2, 5, 10, 20)]
    slopes = {row["method"]: row["predicted"] for row in predicted["slopes_mb_per_layer"]}
    slopes["mf, all resident"] = (resident[-1][1] - resident[0][1]) / (resident[-1][0] - resident[0][0])
    told = [
        {
            "method": name,
            "MiB per layer": round(slope, 3),
            "MB per layer": round(slope * 1.048576, 2),
            "paper": PAPER[name],
        }
        for name, slope in slopes.items()
    ]
    publish(
        asked.out,
        "Peak memory against depth, full-batch MNIST, 1000 units",
        {
            "Measured, two to five layers": [shown(row) for row in measured["rows"]],
            "Predicted": [shown(row) for row in predicted["rows"]],
            "Mono-Forward, all resident, predicted": [
                {"depth": depth, "predicted MiB": round(peak, 1)} for depth, peak in resident
            ],
            "Slopes beside the paper's": told,
        },
        "Backpropagation's slope is its activations (50,000 x 1000 x 4 bytes = 200 MB) and 12 bytes (weight and Adam's"
        " moments) for each of a layer's million parameters; the paper's 204 has 4 bytes for each.",
    )


def shown(row: dict[str, Any]) -> dict[str, Any]:
    names = {"method": "method", "depth": "depth", "peak_mb": "measured MiB", "predicted_mb": "predicted MiB"}
    names |= {"seconds_per_epoch": "s/epoch", "moved_mb_per_epoch": "moved MiB/epoch"}
    return {told: row[name] for name, told in names.items()}


def resident_peak(depth: int) -> float:
    """Predicted MiB of Mono-Forward with everything on the device, in the papers' order of visits."""
    flags = f"--data mnist --net mlp:{WIDTH}x{depth} --batch-size {ROWS} --schedule sequence --placement resident"
    return float(edgetrain(f"plan {flags} --epochs 2 --threads 1")["predicted_peak_mb"])


if __name__ == "__main__":
    main()
