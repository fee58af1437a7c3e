"""A training step with images in channels-last order beside contiguous ones, for the rule in `nets/memory_format.py`.

Run: python benchmarks/memory_format.py [--seconds 1] [--repeats 3] [--out NAME]

Plain PyTorch steps of several nets, both orders in turn, median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import edgetrain  # noqa: F401 # isort: skip (before torch, whose threads would otherwise spin while they wait)

import torch
from plain_loop import Residual, inverted
from reporting import publish
from torch import nn

from edgetrain.nets.memory_format import prefers_channels_last

CLASSES = 10


def convolutions(channels: list[int], inputs: int, size: int = 3, pool: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for count in channels:
        layers += [nn.Conv2d(inputs, count, size, padding=size // 2), nn.ReLU()]
        layers += [nn.AvgPool2d(2)] if pool else []
        inputs = count
    return layers


def normalised(channels: list[int], pooled: set[int], inputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index, count in enumerate(channels):
        layers += [nn.Conv2d(inputs, count, 3, padding=1, bias=False), nn.BatchNorm2d(count), nn.LeakyReLU()]
        layers += [nn.MaxPool2d(2)] if index in pooled else []
        inputs = count
    return layers


def resnet() -> list[nn.Module]:
    return [*normalised([16], set(), 3), Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]


def depthwise() -> list[nn.Module]:
    return [nn.Conv2d(3, 16, 3, 2, 1), inverted(16, 24, 1), inverted(24, 40, 2), inverted(40, 40, 1)]


#: Net, shape of an image, batch size.
NETS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, int, int], int]] = {
    "8-16, grey 8x8": (lambda: convolutions([8, 16], 1), (1, 8, 8), 64),
    "64-128-256-512, grey 28x28": (lambda: convolutions([64, 128, 256, 512], 1), (1, 28, 28), 64),
    "32-64-128-256, 32x32": (lambda: convolutions([32, 64, 128, 256], 3), (3, 32, 32), 64),
    "32-32 without pooling, 32x32": (lambda: convolutions([32, 32], 3, pool=False), (3, 32, 32), 64),
    "5x5 kernels 32-64, grey 28x28": (lambda: convolutions([32, 64], 1, 5), (1, 28, 28), 128),
    "VGG-like with batch norm, 32x32": (lambda: normalised([32, 64, 64, 128], {1, 3}, 3), (3, 32, 32), 64),
    "128-256-256 with batch norm, 32x32": (lambda: normalised([128, 256, 256], {1}, 3), (3, 32, 32), 16),
    "residual blocks, 32x32": (resnet, (3, 32, 32), 64),
    "depthwise blocks, 48x48": (depthwise, (3, 48, 48), 64),
    "patches of 4x4, 32x32": (lambda: [nn.Conv2d(3, 192, 4, 4), nn.ReLU()], (3, 32, 32), 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    table = []
    for name in NETS:
        pairs = [(step(name, False, asked.seconds), step(name, True, asked.seconds)) for _ in range(asked.repeats)]
        ratios = [last / first for first, last in pairs]
        table.append(row(name, ratios, statistics.median(first for first, _ in pairs)))
        print(table[-1], flush=True)
    publish(asked.out, "Channels-last beside contiguous images", {"float32, Adam, two threads": table})


def row(name: str, ratios: list[float], seconds: float) -> dict[str, Any]:
    return {
        "net": name,
        "contiguous, ms a step": round(1e3 * seconds, 1),
        "channels-last / contiguous": round(statistics.median(ratios), 2),
        "from": round(min(ratios), 2),
        "to": round(max(ratios), 2),
        "the rule says": "channels-last" if prefers_channels_last(nn.Sequential(*NETS[name][0]())) else "contiguous",
    }


def step(name: str, channels_last: bool, seconds: float) -> float:
    """Median seconds of a step."""
    layers, shape, batch = NETS[name]
    memory = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    net, x, y = nn.Sequential(*layers(), nn.Flatten()), torch.rand(batch, *shape), torch.randint(0, CLASSES, (batch,))
    net.append(nn.Linear(net(x).shape[1], CLASSES))
    net = net.to(memory_format=memory)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x.contiguous(memory_format=memory)), y).backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
