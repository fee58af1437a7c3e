"""The papers' memory figures: peak device memory of their local rules and of backpropagation, on their nets.

Run: EDGETRAIN_DATA=... python benchmarks/memory_curves.py [--out NAME]

* Mono-Forward, Figure 3a: MLPs of layers of 1000 units, MNIST, 50,000 rows as one batch. The paper's slopes are in
  MB = 1e6 bytes: backpropagation 204.00, Mono-Forward with all cells resident 16.16, "theoretically constant" if
  one were streamed. Figure 3b: convolutions of 64, 128, 256, 512 and 512 channels, CIFAR-10, batch 256.
* Mono-Forward, Figures 1 and 2: what a step of 5 layers of 2000 units holds in its course, batch 30,000.
* Stochastic Layer-wise Learning, Figure 2: MLPs, CNNs and Vision Transformers. Its sizes are not printed; ours are
  in the headings.
* Local Back-Propagation: its four models of 7.9, 12.2, 6.4 and 8.5 million parameters on CIFAR's shape.

What fits into minutes on two cores is measured; the rest is predicted by dry runs. Both stand side by side where
both exist. Figures go to ``results/NAME/`` as PNGs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reporting import RESULTS, edgetrain, publish

from edgetrain.data.specs import open_data
from edgetrain.report.drawing import png
from edgetrain.report.profile import Point
from edgetrain.report.profile_figures import of_profile

WIDTH, ROWS = 1000, 50_000
PAPER = {"bp": 204.00, "mf, all resident": 16.16}  # MB; it did not stream cells
CHANNELS = (64, 128, 256, 512, 512)
FEW_ROWS = 512  # two batches of 256 reach the peak of any number
LBP = {
    "AE-LBP": "--method lbp-ae --net mlp:1024/5",
    "CAE-LBP": "--method lbp-cae --net cnn:64,128,256,512,1024",
    "CNN": "--method bp --like lbp-cae --net cnn:64,128,256,512,1024",
    "MLP": "--method bp --like lbp-ae --net mlp:1024x6",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    asked = parser.parse_args()
    pictures = RESULTS / asked.out if asked.out else Path(tempfile.mkdtemp())
    with tempfile.TemporaryDirectory() as folder:
        few = few_rows("cifar10", 10, Path(folder))
        sections = {
            **mono_forward_dense(pictures / "mf-3a"),
            **mono_forward_timeline(pictures / "mf-1-2"),
            **mono_forward_convolutions(few, pictures),
            **stochastic_layerwise(few, pictures),
            "Local Back-Propagation's four models, 100 classes, batch 128": list(
                local_backpropagation(few_rows("cifar10", 100, Path(folder)))
            ),
        }
    publish(
        asked.out,
        "The papers' memory figures",
        sections,
        "Backpropagation's slope in Figure 3a is its activations (50,000 x 1000 x 4 bytes = 200 MB) and 12 bytes (a"
        " weight and Adam's moments) for each of a layer's million parameters; the paper's 204 has 4 bytes for each."
        " Its 16.16 is 16 bytes for each of 1.01 million parameters: weight, gradient and two moments; here a cell's"
        " gradients are given back before the next cell's turn, which leaves 12. Checkpoints at every layer keep what"
        " an MLP without biases needs anyway. With convolutions the peak is the first layer's, at the image's full"
        " size.",
    )


def few_rows(data: str, classes: int, folder: Path) -> Path:
    """The first rows of a data set as a file, labels made up: a peak depends on neither them nor further batches."""
    train = open_data(data).train
    assert train is not None
    X, _ = next(train.chunks())
    target = folder / f"{data}-{classes}.npz"
    np.savez(target, x_train=X[:FEW_ROWS], y_train=np.arange(FEW_ROWS) % classes)
    return target


def mono_forward_dense(pictures: Path) -> dict[str, list[dict[str, Any]]]:
    flags = f"profile --data mnist --widths {WIDTH} --batch-size {ROWS} --threads 1"
    measured = edgetrain(f"{flags} --methods mf,bp --depths 2,3,5")
    predicted = edgetrain(f"{flags} --depths 2,5,10,20,100,1000 --dry --png {pictures}")
    resident = [(depth, resident_peak(depth)) for depth in (2, 5, 10, 20)]
    (first, low), (last, high) = resident[1], resident[-1]  # from where all caches are there
    slopes = {row["method"]: row["predicted"] for row in predicted["slopes_mb_per_layer"]}
    slopes["mf, all resident"] = (high - low) / (last - first)
    told = [
        {
            "method": name,
            "MiB per layer": round(slope, 3),
            "MB per layer": round(slope * 1.048576, 2),
            "paper, MB": PAPER.get(name),
        }
        for name, slope in slopes.items()
    ]
    return {
        "Mono-Forward, Figure 3a: slopes beside the paper's": told,
        "Measured, two to five layers": [shown(row) for row in measured["rows"]],
        "Predicted": [shown(row) for row in predicted["rows"]],
        "Mono-Forward, all resident, predicted": [
            {"depth": depth, "predicted MiB": round(peak, 1)} for depth, peak in resident
        ],
    }


def resident_peak(depth: int) -> float:
    """Predicted MiB of Mono-Forward with everything on the device, in the papers' order of visits."""
    flags = f"--data mnist --net mlp:{WIDTH}x{depth} --batch-size {ROWS} --schedule sequence --placement resident"
    return float(edgetrain(f"plan {flags} --epochs 2 --threads 1")["predicted_peak_mb"])


def mono_forward_timeline(pictures: Path) -> dict[str, list[dict[str, Any]]]:
    flags = "profile --data mnist --methods mf,bp --depths 5 --widths 2000 --batch-size 30000 --dry --timeline"
    found = edgetrain(f"{flags} --png {pictures}")
    rows = []
    for method, visits in found["timelines"].items():
        top = max(visits, key=lambda visit: visit["peak_mb"])
        held = dict(zip(found["kinds"], max(top["mb"], key=sum), strict=True))
        rows.append({"method": method, "peak MiB": top["peak_mb"], "at": top["peak_at"], **held})
    return {"Mono-Forward, Figures 1 and 2: MiB at the peak of a step, 5 layers of 2000, batch 30,000": rows}


def mono_forward_convolutions(few: Path, pictures: Path) -> dict[str, list[dict[str, Any]]]:
    points = []
    for method in ("mf", "bp", "bp-checkpoint", "bp-offload"):
        for depth in range(1, len(CHANNELS) + 1):
            net = f"cnn:{','.join(map(str, CHANNELS[:depth]))}"
            flags = f"--data {few} --method {method} --net {net} --batch-size 256 --placement stream --threads 1"
            points.append(measured_point(method, depth, flags))
    drawn(points, pictures / "mf-3b")
    return {"Mono-Forward, Figure 3b: convolutions of 64, 128, 256, 512, 512 channels, batch 256": table(points)}


def measured_point(method: str, depth: int, flags: str) -> Point:
    """A net that is planned and trained for two steps."""
    with tempfile.TemporaryDirectory() as folder:
        record = edgetrain(f"fit {flags} --epochs 1 --quiet --run-dir {folder}/run")
    return Point(method, depth, 0, 256, record["peak_gpu_mb"], record["predicted_peak_mb"], None, None)


def stochastic_layerwise(few: Path, pictures: Path) -> dict[str, list[dict[str, Any]]]:
    families = {
        "MLPs of 1024 units": ("sll,bp", "--family mlp --widths 1024 --depths 1,2,4,8,16"),
        "CNNs of 128 channels": ("sll,bp", "--family cnn --widths 128 --depths 1,2,3,4,5"),
        "Vision Transformers of 384 numbers, patches of 4": ("sll+,bp", "--family vit --widths 384 --depths 1,2,4,7"),
    }
    sections = {}
    for name, (methods, flags) in families.items():
        pictures_of = pictures / f"sll-2-{flags.split()[1]}"
        found = edgetrain(
            f"profile --data {few} --methods {methods} --batch-size 128 --threads 1 --dry {flags} --png {pictures_of}"
        )
        rows = [shown(row) for row in found["rows"]]
        deepest = {row["method"]: row["predicted_mb"] for row in found["rows"]}
        local = methods.partition(",")[0]
        saved = 1 - deepest[local] / deepest["bp"]
        slopes = {row["method"]: row["predicted"] for row in found["slopes_mb_per_layer"]}
        compared = f"{abs(saved):.0%} {'less' if saved > 0 else 'more'} at the deepest"
        heading = (
            f"Stochastic Layer-wise Learning, Figure 2: {name}, batch 128; {slopes[local]:.2f} MiB a layer beside"
            f" {slopes['bp']:.2f}, {compared}"
        )
        sections[heading] = rows
    return sections


def local_backpropagation(few: Path) -> Iterable[dict[str, Any]]:
    for name, flags in LBP.items():
        with tempfile.TemporaryDirectory() as folder:
            words = f"fit --data {few} {flags} --batch-size 128 --placement stream --threads 1 --epochs 1 --quiet"
            record = edgetrain(f"{words} --run-dir {folder}/run")
        cells = [*record["cells"], *([record["classifier"]] if record["classifier"] else [])]
        params = sum(cell["params"] for cell in cells)
        peak, bp = record["peak_gpu_mb"], record["bp_predicted_peak_mb"]
        yield {
            "model": name,
            "million parameters": round(params / 1e6, 2),
            "measured MiB": peak,
            "predicted MiB": record["predicted_peak_mb"],
            "backpropagation on the same net, MiB": bp,
        }


def drawn(points: Sequence[Point], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in of_profile(points, {}):
        png(drawing, folder / f"{drawing.name}.png")


def table(points: Sequence[Point]) -> list[dict[str, Any]]:
    names = {"method": "method", "depth": "depth", "peak_mb": "measured MiB", "predicted_mb": "predicted MiB"}
    return [{told: getattr(point, name) for name, told in names.items()} for point in points]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    names = {"method": "method", "depth": "depth", "peak_mb": "measured MiB", "predicted_mb": "predicted MiB"}
    names |= {"seconds_per_epoch": "s/epoch", "moved_mb_per_epoch": "moved MiB/epoch"}
    return {told: row[name] for name, told in names.items()}


if __name__ == "__main__":
    main()
