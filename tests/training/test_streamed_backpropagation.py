"""``bp-stream`` gives the weights of ``bp-checkpoint``, bit for bit, with one layer at a time on the device."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import assert_same, stopped_after, units
from simulated_cuda import simulated_cuda
from torch import Tensor, nn

import edgetrain
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.data.layout import Reading
from edgetrain.errors import BudgetError, InputError
from edgetrain.stream.streamed import StreamedLayer
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job

ROWS, CLASSES, SIDE = 70, 3, 8  # 16 in a batch: the last one is short
FAST: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "threads": 1,
    "device": "cpu",
    "lr": 1e-2,
    "checkpoint_every": 1e9,
}


def images(rows: int = ROWS) -> DataSet:
    draw = np.random.default_rng(1)
    y = np.arange(rows) % CLASSES
    x = draw.integers(0, 120, (rows, 3, SIDE, SIDE)) + 40 * y[:, None, None, None]
    return from_arrays((x.astype(np.uint8), y), (x[:20].astype(np.uint8), y[:20]), reading=Reading(channels="first"))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, momentum=momentum) for momentum in (0.1, None))
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        z = self.norms[0](self.first(x)).relu()
        return torch.relu(self.norms[1](self.second(z)) + self.short(x))


def resnet() -> list[nn.Module]:
    torch.manual_seed(2)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, CLASSES)]
    return [stem, Residual(6, 6, 1), Residual(6, 10, 2), *head]


def dropped() -> list[nn.Module]:
    """Dropout, an in-place first operation, frozen weights, and an output of another layout."""
    torch.manual_seed(4)
    frozen = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.3)).requires_grad_(False)
    turned = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 12), nn.Unflatten(1, (3, 4)), Turned())
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 12), nn.Dropout(0.2)),
        frozen,
        turned,
        nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.RReLU()),
        nn.Linear(9, CLASSES),
    ]


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


VIT = "vit:depth=3,width=12,heads=2,patch=4;dropout=0.2"
NETS: dict[str, Any] = {
    "mlp": "mlp:20,12,12,7;bias=1",
    "cnn": "cnn:5,6;norm=none",
    "one": "mlp:9",
    "vit": VIT,
    "resnet": resnet,
    "own": dropped,
}


def trained(path: Path, method: str, net: str, data: DataSet | None = None, **values: Any) -> edgetrain.Run:
    given = NETS[net]
    asked = {**FAST, "method": method, **values}
    if callable(given):
        return fit(
            Settings().with_values({**asked, "net": "modules"}), path, given(), images() if data is None else data
        )
    return fit(Settings().with_values({**asked, "net": given}), path, data=images() if data is None else data)


def whole_names(found: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors of a streamed net under the names that they have in a net of one cell."""
    named = {}
    for name, value in found.items():
        layer, _, rest = name.partition("/")
        if not layer.isdigit():
            named[name] = value
        elif rest.startswith("head.") or ".head." in rest:
            assert int(layer) == depth - 1
            named[f"000/{rest}"] = value
        else:
            named["000/" + re.sub(r"(^|\.)cell\.", rf"\g<1>cell.{int(layer)}.", rest, count=1)] = value
    return named


def assert_streams_to_the_same_bits(tmp_path: Path, net: str, data: DataSet | None = None, **values: Any) -> None:
    streamed = trained(tmp_path / "streamed", "bp-stream", net, data, **values)
    assert streamed.record.peak_gpu_mb == streamed.record.predicted_peak_mb
    only = ("max_host_mb", "placement")
    kept = trained(tmp_path / "kept", "bp-checkpoint", net, data, **{k: v for k, v in values.items() if k not in only})
    assert_same(whole_names(units(streamed.path), len(streamed.nodes)), units(kept.path))
    assert list(streamed.record.cells[-1].losses) == kept.record.cells[0].losses
    assert streamed.record.test_accuracy == kept.record.test_accuracy
    assert {cell.epochs for cell in streamed.record.cells} == {kept.record.cells[0].epochs}
    assert all(cell.seconds > 0 for cell in streamed.record.cells)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "optimizer",
    [{"optimizer": "sgd", "momentum": 0.9, "nesterov": True}, {"optimizer": "adamw"}, {"optimizer": "adamax"}],
    ids=["sgd", "adamw", "adamax"],
)
def test_the_weights_are_those_of_checkpointing(net: str, optimizer: dict[str, Any], tmp_path: Path) -> None:
    assert_streams_to_the_same_bits(tmp_path, net, **optimizer)


@pytest.mark.parametrize("micro_batch", [1, 5, 16])
@pytest.mark.parametrize("net", ["mlp", "cnn", "vit", "own"])
def test_in_micro_batches_too(net: str, micro_batch: int, tmp_path: Path) -> None:
    assert_streams_to_the_same_bits(tmp_path, net, micro_batch=micro_batch)


@pytest.mark.parametrize("net", ["cnn", "resnet", "vit"])
def test_with_a_schedule_clipped_gradients_augmented_images_and_validation(net: str, tmp_path: Path) -> None:
    assert_streams_to_the_same_bits(
        tmp_path, net, lr_schedule="one-cycle", clip_value=0.01, augment="crop,flip", validation=0.2, weight_decay=0.01
    )


def test_a_small_host_puts_layers_and_batches_on_disk(tmp_path: Path) -> None:
    values = {"net": NETS["mlp"], "method": "bp-stream", **FAST}
    job = open_job(Settings().with_values(values), data=images())
    needed = plan_job(job).host_bytes
    small = {"max_host_mb": (needed - 1) / (1 << 20)}
    plan = plan_job(open_job(Settings().with_values({**values, **small}), data=images()))
    assert plan.spills_batch
    assert plan.host_fits
    assert plan.written_bytes > plan_job(job).written_bytes
    assert_streams_to_the_same_bits(tmp_path, "mlp", **small)
    assert_streams_to_the_same_bits(tmp_path / "leanest", "cnn", placement="stream")


@pytest.mark.parametrize("net", ["cnn", "own"])
@pytest.mark.parametrize("questions", [1, 4, 7])
def test_a_stopped_run_resumes_to_the_same_bits(net: str, questions: int, tmp_path: Path) -> None:
    given = NETS[net]
    own = given() if callable(given) else None
    asked = Settings().with_values({**FAST, "method": "bp-stream", "net": "modules" if own else given})
    if own is None:
        stopped_after(questions, asked, tmp_path / "cut", images())
        fit(asked, tmp_path / "cut", data=images(), resume=True)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StreamedLayer, "backward", failing(StreamedLayer.backward, 5 * questions))
            with pytest.raises(KeyboardInterrupt):
                fit(replace(asked, checkpoint_every=0.0), tmp_path / "cut", own, images())
        fit(replace(asked, checkpoint_every=0.0), tmp_path / "cut", own, images(), resume=True)
    whole = trained(tmp_path / "whole", "bp-stream", net)
    assert_same(units(tmp_path / "cut"), units(whole.path))


def failing(real: Any, calls: int) -> Any:
    """Fails in the middle of a step: some layers have made theirs, others have not."""
    done = 0

    def backward(self: Any, *args: Any) -> None:
        nonlocal done
        done += 1
        if done > calls + 2:
            raise KeyboardInterrupt
        real(self, *args)

    return backward


def test_only_one_layer_is_on_the_device() -> None:
    peaks = []
    for depth in (3, 12):
        values = {**FAST, "method": "bp-stream", "net": f"mlp:64x{depth}"}
        plan = plan_job(open_job(Settings().with_values(values), data=images()))
        peaks.append(plan.predicted_peak)
        assert plan.predicted_peak == max(cell.peak for cell in plan.cells)
    assert peaks[0] == peaks[1]


def test_all_layers_share_the_micro_batch_that_fits_the_largest(tmp_path: Path) -> None:
    values = {**FAST, "method": "bp-stream", "net": "cnn:12,3", "batch_size": 32}
    free = plan_job(open_job(Settings().with_values(values), data=images()))
    tight = {**values, "max_gpu_mb": free.predicted_peak * 0.6 / (1 << 20)}
    run = fit(Settings().with_values(tight), tmp_path / "run", data=images())
    micro = {cell.micro_batch for cell in run.record.cells}
    assert len(micro) == 1
    assert max(micro) < 32
    assert run.record.peak_gpu_mb is not None
    assert run.record.peak_gpu_mb <= tight["max_gpu_mb"]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"clip_norm": 1.0}, InputError, "--clip-norm"),
        ({"tiles": 2}, InputError, "--tiles"),
        ({"placement": "resident"}, InputError, "--placement resident"),
        ({"schedule": "sequence"}, InputError, "--schedule"),
        ({"max_gpu_mb": 0.01}, BudgetError, "smallest budget"),
        ({"max_host_mb": 0.01}, BudgetError, "--max-host-mb"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    values: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        trained(tmp_path / "run", "bp-stream", "mlp", **values)
    assert not (tmp_path / "run").exists()


def test_weights_that_layers_share_are_refused(tmp_path: Path) -> None:
    first, second = nn.Linear(12, 12), nn.Linear(12, 12)
    second.weight = first.weight
    x, y = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32), np.arange(40) % CLASSES
    with pytest.raises(InputError, match="--method bp"):
        edgetrain.fit([first, second], (x, y), "bp-stream", run_dir=tmp_path / "run")


@pytest.mark.parametrize("net", ["mlp", "cnn", "vit"])
def test_on_a_simulated_gpu_the_bits_are_the_same_within_the_budget(net: str, tmp_path: Path) -> None:
    values = {"memory_format": "contiguous", "micro_batch": 8}
    with simulated_cuda() as cuda:
        found = trained(tmp_path / "cuda", "bp-stream", net, **{**values, "device": "cuda"})
        assert found.record.peak_gpu_mb is not None
        assert found.record.peak_gpu_mb <= (found.record.predicted_peak_mb or 0.0)
        assert cuda.peak > 0
    assert_same(units(found.path), units(trained(tmp_path / "cpu", "bp-stream", net, **values).path))


@pytest.mark.parametrize("micro_batch", [16, 6])
def test_a_net_of_one_layer_is_streamed_too(micro_batch: int, tmp_path: Path) -> None:
    streamed = trained(tmp_path / "streamed", "bp-stream", "one", micro_batch=micro_batch)
    kept = trained(tmp_path / "kept", "bp", "one", micro_batch=micro_batch)
    assert_same(whole_names(units(streamed.path), 1), units(kept.path))
