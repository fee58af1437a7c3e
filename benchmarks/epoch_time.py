"""Seconds per epoch: streamed MF, all-resident MF, our `bp`, and backpropagation in plain PyTorch.

Run: python benchmarks/epoch_time.py [--rows 20000] [--repeats 3] [--out NAME]

The peers take turns within one run. All use fused Adam, the same threads, batches and order of data;
"plain" is a loop written here that keeps the data set in memory as float32. Arithmetic says that
backpropagation needs 4 units for the first layer and 6 for each later one, MF 4 for each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import edgetrain  # isort: skip (before torch, whose threads would otherwise spin while they wait)

import numpy as np
import torch
from reporting import publish

from edgetrain.keys import epoch_order

INPUTS, CLASSES, WIDTH, EPOCHS = 784, 10, 1000, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depths", default="2,8")
    parser.add_argument("--batches", default="256,1024")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that compute")
    parser.add_argument("--out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (asked.rows, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, asked.rows)
    table = []
    for depth in map(int, asked.depths.split(",")):
        for batch in map(int, asked.batches.split(",")):
            table.append(compare(rows, labels, depth, batch, asked.repeats))
            print(table[-1], flush=True)
    notes = (
        "Times are medians of the repeats, in seconds per epoch; MF runs the sequence schedule, so emitting and"
        " storing latents is included. `arithmetic` is what the units say MF should need of backpropagation's time."
    )
    publish(
        asked.out,
        "Seconds per epoch",
        {f"{asked.rows} rows of 784, width {WIDTH}, {asked.threads} threads": table},
        notes,
    )


def compare(rows: np.ndarray, labels: np.ndarray, depth: int, batch: int, repeats: int) -> dict[str, object]:
    times: dict[str, list[float]] = defaultdict(list)
    waited = []
    for _ in range(repeats):
        for name, method, placement in (
            ("streamed MF", "mf", "stream"),
            ("resident MF", "mf", "resident"),
            ("bp", "bp", "resident"),
        ):
            seconds, waiting = ours(rows, labels, depth, batch, method, placement)
            times[name].append(seconds)
            if name == "streamed MF":
                waited.append(waiting)
        times["plain bp"].append(plain(rows, labels, depth, batch))
    median = {name: statistics.median(values) for name, values in times.items()}
    first, later = INPUTS * WIDTH, WIDTH * WIDTH * (depth - 1)
    return {
        "net": f"{depth}x{WIDTH}",
        "batch": batch,
        **{f"{name} (s)": median[name] for name in times},
        "streamed / resident": median["streamed MF"] / median["resident MF"],
        "streamed / plain bp": median["streamed MF"] / median["plain bp"],
        "arithmetic": 4 * (first + later) / (4 * first + 6 * later),
        "waited": statistics.median(waited),
    }


def ours(
    rows: np.ndarray, labels: np.ndarray, depth: int, batch: int, method: str, placement: str
) -> tuple[float, float]:
    """Seconds of an epoch's visits, and the share of them spent waiting for data."""
    schedule = {} if method == "bp" else {"schedule": "sequence"}
    with tempfile.TemporaryDirectory() as folder:
        run = edgetrain.fit(
            f"mlp:{WIDTH}x{depth}",
            (rows, labels),
            method=method,
            epochs=EPOCHS,
            batch_size=batch,
            placement=placement,
            threads=torch.get_num_threads(),
            run_dir=Path(folder) / "run",
            **schedule,
        )
    seconds = sum(cell.seconds for cell in run.record.cells)
    return seconds / EPOCHS, run.record.waited_seconds / seconds


def plain(rows: np.ndarray, labels: np.ndarray, depth: int, batch: int) -> float:
    """Seconds of an epoch of backpropagation in plain PyTorch."""
    x = torch.from_numpy(rows).reshape(len(rows), -1).float().div_(255)
    y = torch.from_numpy(labels)
    layers: list[torch.nn.Module] = []
    for index in range(depth):
        layers += [torch.nn.Linear(WIDTH if index else INPUTS, WIDTH, bias=False), torch.nn.ReLU(inplace=True)]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, CLASSES, bias=False))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        order = torch.from_numpy(epoch_order(0, epoch, len(rows)))
        for first in range(0, len(rows), batch):
            picked = order[first : first + batch]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[picked]), y[picked]).backward()
            optimizer.step()
    return (time.perf_counter() - start) / EPOCHS


if __name__ == "__main__":
    main()
