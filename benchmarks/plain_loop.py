"""Our ``bp`` beside a plain PyTorch loop: the same net, weights, rows, order, optimizer and memory format.

Run: python benchmarks/plain_loop.py [--seconds 10] [--repeats 3] [--out NAME]

The two take turns within one run. The loop has what one would want of it: rows in memory, prepared before the clock
starts, images in the faster memory format, fused Adam, no reads of the loss. Ours is timed by its visits, with reading
rows from disk, normalising, metering and the training accuracy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgetrain  # isort: skip (before torch, whose threads would otherwise spin while they wait)

import numpy as np
import torch
from reporting import publish
from torch import Tensor, nn

from edgetrain.keys import epoch_order

CLASSES, BATCH = 10, 64


class Residual(nn.Module):
    """A block of a small ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return torch.relu(self.body(x) + self.short(x))


def inverted(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A block with a depthwise convolution, as EfficientNet-Lite has them."""
    wide = 4 * inputs
    return nn.Sequential(
        nn.Conv2d(inputs, wide, 1, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU6(),
        nn.Conv2d(wide, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Tokens(nn.Module):
    """Patches of 4 x 4 as tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, T, width]."""
        return self.patches(x).flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """The mean of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]."""
        return x.mean(1)


def mlp() -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (3 * 32 * 32, 1000):
        layers += [nn.Linear(inputs, 1000), nn.ReLU()]
    return [*layers, nn.Linear(1000, CLASSES)]


def cnn() -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    return [*layers, nn.Flatten(), nn.Linear(256 * 4, CLASSES)]


def resnet() -> list[nn.Module]:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2)]
    return [stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)]


def depthwise() -> list[nn.Module]:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    blocks = [inverted(16, 24, 1), inverted(24, 24, 1), inverted(24, 40, 2), inverted(40, 40, 1)]
    return [stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, CLASSES)]


def vit() -> list[nn.Module]:
    blocks = [nn.TransformerEncoderLayer(96, 4, 192, 0.0, batch_first=True, norm_first=True) for _ in range(4)]
    return [Tokens(96), *blocks, Mean(), nn.Linear(96, CLASSES)]


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "MLP 2x1000": mlp, "CNN 32-64-128-256": cnn, "ResNet, 4 blocks": resnet, "depthwise, 4 blocks": depthwise,
    "ViT, 4 blocks of 96": vit,
}  # fmt: skip
CHANNELS_LAST = ("CNN 32-64-128-256", "ResNet, 4 blocks", "depthwise, 4 blocks")  # where the loop is faster so


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="that a run of the loop takes, about")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", default="cifar10", help="images 3x32x32")
    parser.add_argument("--out")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    table = []
    for name in NETS:
        table.append(compare(name, images(asked.data), asked.seconds, asked.repeats))
        print(table[-1], flush=True)
    notes = (
        "Times are medians of the repeats, in seconds for the same epochs; the ratio is of times in the same repeat,"
        " median and range. Accuracies are of the test rows after the last repeat, from the same weights and order."
    )
    publish(asked.out, "bp beside a plain PyTorch loop", {f"batch {BATCH}, Adam 1e-3, two threads": table}, notes)


def images(name: str) -> tuple[Any, Any, Any, Any]:
    """Training and test images uint8 [N, 3, 32, 32] and labels; random ones where the data set is not here."""
    from edgetrain.data.specs import open_data

    try:
        data = open_data(name)
    except edgetrain.EdgetrainError:
        draw = np.random.default_rng(0)
        x, y = draw.integers(0, 256, (9000, 3, 32, 32), dtype=np.uint8), draw.integers(0, CLASSES, 9000)
        return x[:8000], y[:8000], x[8000:], y[8000:]
    found: list[Any] = []
    for part, rows in ((data.train, 8000), (data.test, 1000)):
        assert part is not None
        chunks = list(part.chunks())
        x, y = (np.concatenate([chunk[index] for chunk in chunks])[:rows] for index in (0, 1))
        found += [x.reshape(-1, 3, 32, 32), y]
    return found[0], found[1], found[2], found[3]


def compare(name: str, data: tuple[Any, Any, Any, Any], seconds: float, repeats: int) -> dict[str, Any]:
    """Times of both, in turn."""
    x = data[0]
    once, _ = plain(name, data, 1, min(len(x), 20 * BATCH))
    rows = int(min(len(x), max(20 * BATCH, seconds / once * 20 * BATCH)))
    epochs = max(1, round(seconds / (once * rows / (20 * BATCH))))
    pairs = [(plain(name, data, epochs, rows), ours(name, data, epochs, rows)) for _ in range(repeats)]
    ratios = [own[0] / loop[0] for loop, own in pairs]
    return {
        "net": name,
        "rows": rows,
        "epochs": epochs,
        "plain loop (s)": round(statistics.median(loop[0] for loop, _ in pairs), 2),
        "bp (s)": round(statistics.median(own[0] for _, own in pairs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "from": round(min(ratios), 3),
        "to": round(max(ratios), 3),
        "accuracy, loop": round(pairs[-1][0][1], 4),
        "accuracy, bp": round(pairs[-1][1][1], 4),
    }


def ours(name: str, data: tuple[Any, Any, Any, Any], epochs: int, rows: int) -> tuple[float, float]:
    """Seconds of the visits, and test accuracy."""
    x, y, test_x, test_y = data
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = edgetrain.fit(
            NETS[name](), (x[:rows], y[:rows]), "bp", epochs=epochs, batch_size=BATCH, threads=2, seed=0,
            channels="first", normalize="0,0,0/1,1,1", run_dir=Path(folder) / "run",
        )  # fmt: skip
        accuracy = float((run.predict(test_x) == test_y).mean())
    return sum(cell.seconds for cell in run.record.cells), accuracy


def plain(name: str, data: tuple[Any, Any, Any, Any], epochs: int, rows: int) -> tuple[float, float]:
    """Likewise, of the loop."""
    x, y, test_x, test_y = data
    torch.manual_seed(0)
    memory = torch.channels_last if name in CHANNELS_LAST else torch.contiguous_format
    net = nn.Sequential(*NETS[name]()).to(memory_format=memory)  # type: ignore[call-overload]
    values = torch.from_numpy(x[:rows]).float().div_(255).contiguous(memory_format=memory)
    labels = torch.from_numpy(y[:rows])
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    start = time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.from_numpy(epoch_order(0, epoch, rows)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(values[batch]), labels[batch]).backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        scores = net.eval()(torch.from_numpy(test_x).float().div_(255))
    return seconds, float((scores.argmax(1).numpy() == test_y).mean())


if __name__ == "__main__":
    main()
