"""Images in channels-last order: which cells compute so, and that nothing but the order of summation changes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import assert_same, stopped_after, units
from torch import Tensor, nn

import edgetrain
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.keys import epoch_order
from edgetrain.nets.memory_format import prefers_channels_last
from edgetrain.nets.spec import open_net
from edgetrain.nets.trial import try_module
from edgetrain.planning.workload import Workload
from edgetrain.training import config_file
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job

ROWS, CLASSES, SIDE = 72, 3, 8
FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu", "normalize": "none", "lr": 1e-2}


def images() -> tuple[Any, Any]:
    draw = np.random.default_rng(1)
    y = np.arange(ROWS) % CLASSES
    return draw.integers(0, 120, (ROWS, 3, SIDE, SIDE)).astype(np.uint8) + (40 * y[:, None, None, None]).astype(
        np.uint8
    ), y


def net() -> list[nn.Module]:
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    wide = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.ReLU())
    return [stem, wide, nn.Flatten(), nn.Linear(16 * (SIDE // 2) ** 2, CLASSES)]


class Viewed(nn.Module):
    """What many people write: it fails on tensors that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * SIDE * SIDE, 12)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.linear(z.view(z.size(0), -1)).relu()


class Strided(nn.Module):
    """Reads memory as if it were contiguous, without failing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return z.as_strided((z.size(0), 8 * SIDE * SIDE), (8 * SIDE * SIDE, 1)).relu()


def test_the_rule_is_overlapping_convolutions() -> None:
    assert prefers_channels_last(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)))
    assert prefers_channels_last(nn.Conv2d(4, 4, (1, 3)))
    assert not prefers_channels_last(nn.Conv2d(3, 4, 4, 4))
    assert not prefers_channels_last(nn.Conv2d(3, 4, 1))
    assert not prefers_channels_last(nn.Sequential(nn.Linear(3, 4), nn.Conv1d(3, 4, 3)))
    for spec, expected in (
        ("cnn:4", True),
        ("vgg8b:0.1", True),
        ("mlp:4", False),
        ("vit:depth=1,width=8,patch=4,heads=2", False),
    ):
        assert open_net(spec, (3, 16, 16), {}, None, 0, (3, 16, 16), CLASSES).cells[0].channels_last == expected, spec


@pytest.mark.parametrize(("method", "expected"), [("mf", [True, True]), ("bp", [True])])
def test_the_order_is_resolved_into_the_settings(method: str, expected: list[bool], tmp_path: Path) -> None:
    run = edgetrain.fit(net(), images(), method, run_dir=tmp_path / "auto", channels="first", **FAST)
    assert run.settings.memory_format == "channels-last"
    assert [node.channels_last for node in run.nodes] == expected
    plain = edgetrain.fit(
        net(), images(), method, run_dir=tmp_path / "plain", channels="first", memory_format="contiguous", **FAST
    )
    assert not any(node.channels_last for node in plain.nodes)
    found, other = units(run.path), units(plain.path)
    assert found.keys() == other.keys()
    assert not all(torch.equal(found[name], other[name]) for name in found), "the order changes how sums are rounded"
    assert np.allclose(run.scores(images()[0]), plain.scores(images()[0]), atol=0.2)


@pytest.mark.parametrize("order", ["channels-last", "contiguous"])
def test_backpropagation_is_the_plain_loop_in_the_same_order_bit_for_bit(order: str, tmp_path: Path) -> None:
    x, y = images()
    modules, memory = net(), torch.channels_last if order == "channels-last" else torch.contiguous_format
    run = edgetrain.fit(
        deepcopy(modules), (x, y), "bp", run_dir=tmp_path / "run", channels="first", memory_format=order, **FAST
    )
    whole = nn.Sequential(*modules).to(memory_format=memory)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(whole.parameters(), 1e-2, fused=True)
    values, labels = torch.from_numpy(x).float().div(255), torch.from_numpy(y)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for epoch in range(2):
        for rows in torch.from_numpy(epoch_order(0, epoch, ROWS)).split(16):
            optimizer.zero_grad()
            scores = whole(values[rows].contiguous(memory_format=memory))
            (nn.functional.cross_entropy(scores, labels[rows], reduction="sum") / len(rows)).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    trained = run.model().state_dict()
    assert all(value.is_contiguous() for value in trained.values()), "a user's model can be saved"
    kept = [value for name, value in trained.items() if name.startswith("cells")]
    expected = [value for name, value in whole.state_dict().items() if not name.startswith("3.")]
    assert len(kept) >= len(expected) > 8
    assert all(any(each.shape == value.shape and torch.equal(each, value) for each in kept) for value in expected)


@pytest.mark.parametrize(
    ("method", "schedule"), [("mf", "separate"), ("mf", "sequence"), ("bp", None), ("predsim", None)]
)
@pytest.mark.parametrize("optimizer", ["adam", "adamax", "sgd"])
def test_streamed_resident_and_resumed_runs_have_the_same_bits_and_keep_their_peak(
    method: str, schedule: str | None, optimizer: str, tmp_path: Path
) -> None:
    rows = from_arrays(images(), images(), reading=Reading(channels="first"))
    values = {**FAST, "net": "cnn:4,6;norm=batch", "method": method, "optimizer": optimizer, "checkpoint_every": 0.0}
    if schedule is not None:
        values["schedule"] = schedule
    asked = Settings().with_values({**values, "placement": "stream"})
    whole = fit(asked, tmp_path / "whole", data=rows)
    assert all(node.channels_last for node in whole.nodes)
    assert whole.record.peak_gpu_mb == whole.record.predicted_peak_mb
    stopped_after(6, asked, tmp_path / "cut", rows)
    fit(asked, tmp_path / "cut", data=rows, resume=True)
    assert_same(units(tmp_path / "cut"), units(whole.path))
    fit(Settings().with_values({**values, "placement": "resident"}), tmp_path / "resident", data=rows)
    assert_same(units(tmp_path / "resident"), units(whole.path))


@pytest.mark.parametrize("kind", [Viewed, Strided])
@pytest.mark.parametrize("method", ["mf", "bp"])
def test_modules_that_need_contiguous_images_get_them(method: str, kind: type[nn.Module], tmp_path: Path) -> None:
    assert try_module(kind(), torch.rand(6, 3, SIDE, SIDE), "it").needs_contiguous
    assert not try_module(net()[0], torch.rand(6, 3, SIDE, SIDE), "it").needs_contiguous
    run = edgetrain.fit([kind()], images(), method, run_dir=tmp_path / "run", channels="first", **FAST)
    assert not any(node.channels_last for node in run.nodes)
    first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    mixed = edgetrain.fit([first, kind()], images(), method, run_dir=tmp_path / "mixed", channels="first", **FAST)
    assert [node.channels_last for node in mixed.nodes] == ([True, False] if method == "mf" else [False])


def test_the_plan_compares_with_backpropagation_in_the_same_order() -> None:
    from edgetrain.planning.planner import backprop_work

    rows = from_arrays(images(), images(), reading=Reading(channels="first"))
    for order in ("channels-last", "contiguous"):
        job = open_job(Settings().with_values({**FAST, "net": "cnn:4,6", "memory_format": order}), data=rows)
        whole: Workload = backprop_work(job.work, job.net)
        assert [node.channels_last for node in whole.nodes] == [order == "channels-last"]


def test_a_run_of_before_the_setting_stays_contiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = edgetrain.fit(net(), images(), run_dir=tmp_path / "run", channels="first", **FAST)
    read = config_file._values
    assert config_file.settings_of(run.path).memory_format == "channels-last"

    def before(path: Path) -> dict[str, Any]:
        return {name: value for name, value in read(path).items() if name != "memory_format"}

    monkeypatch.setattr(config_file, "_values", before)
    assert config_file.settings_of(run.path).memory_format == "contiguous"
