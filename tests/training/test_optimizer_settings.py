"""Momentum, betas, clipping and learning-rate schedules: runs against plain PyTorch loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from machine import BATCH, EPOCHS, LR, SEED, UNEVEN, assert_same, data, first_weights, settings, stopped_after, units
from reference.batches import shuffled
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler as schedulers

from edgetrain.errors import InputError
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")

Make = Any
STEPS = EPOCHS * -(-len(data("pixels").x) // BATCH)
RUNS: dict[str, tuple[dict[str, Any], Make, Make]] = {
    "momentum": (
        {"optimizer": "sgd", "momentum": 0.9, "lr_schedule": "cosine"},
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, fused=True),
        lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    ),
    "nesterov": (
        {"optimizer": "sgd", "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "lr_schedule": "one-cycle"},
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.8, nesterov=True, weight_decay=0.01, fused=True),
        lambda o: schedulers.OneCycleLR(o, LR, total_steps=STEPS, cycle_momentum=False),
    ),
    "betas": (
        {"optimizer": "adam", "betas": "0.7, 0.95", "lr_schedule": f"step:{EPOCHS - 1}:0.5"},
        lambda p: torch.optim.Adam(p, lr=LR, betas=(0.7, 0.95), fused=True),
        lambda o: schedulers.MultiStepLR(o, [STEPS // EPOCHS * (EPOCHS - 1)], 0.5),
    ),
    "adamw": (
        {"optimizer": "adamw", "lr_schedule": "linear-warmup:0.3"},
        lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0, fused=True),
        lambda o: schedulers.LambdaLR(o, warmed),
    ),
    "adamax": (
        {"optimizer": "adamax", "lr_schedule": "cosine"},
        lambda p: torch.optim.Adamax(p, lr=LR, foreach=False),
        lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    ),
}
CLIPPING = {
    "value": ({"clip_value": 1e-3}, lambda p: nn.utils.clip_grad_value_(p, 1e-3)),
    "norm": ({"clip_norm": 1e-2}, lambda p: nn.utils.clip_grad_norm_(p, 1e-2)),
}


def warmed(step: int) -> float:
    rise = 0.3 * STEPS
    return (step + 1) / (rise + 1) if step < rise else (STEPS - step) / (STEPS - rise)


def plain_bp(make: Make, schedule: Make, clip: Make = None) -> list[torch.Tensor]:
    """Weights after plain backpropagation."""
    (whole,), (head,) = first_weights("bp", "pixels", net=UNEVEN)
    net = nn.Sequential(nn.Flatten(), *(part for part in whole), head)
    optimizer = make(net.parameters())
    scheduler, x, y, done = schedule(optimizer), data("pixels").x, data("pixels").y, 0
    for epoch in range(EPOCHS):
        for batch in shuffled(SEED, epoch, len(x), BATCH):
            optimizer.zero_grad()
            (cross_entropy(net(x[batch]), y[batch], reduction="sum") / len(batch)).backward()
            if clip is not None:
                clip(net.parameters())
            optimizer.step()
            done += 1
            if done < STEPS:
                scheduler.step()
    return [value.detach() for value in net.parameters()]


def constant(optimizer: torch.optim.Optimizer) -> schedulers.LRScheduler:
    return schedulers.ConstantLR(optimizer, factor=1.0)


def weights(found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [value for name, value in found.items() if "/optim." not in name]


def bp(tmp_path: Path, **values: Any) -> list[torch.Tensor]:
    run = fit(settings("bp", net=UNEVEN, **values), tmp_path / "run", data=data("pixels").set)
    whole, head = run.model().cells[0], run.model().heads[0]
    return [value.detach() for module in (whole, head) for value in module.parameters()]


@pytest.mark.parametrize("name", RUNS)
def test_backpropagation_is_the_plain_loop_with_that_optimizer_and_schedule(name: str, tmp_path: Path) -> None:
    values, make, schedule = RUNS[name]
    expected = plain_bp(make, schedule)
    for found, value in zip(bp(tmp_path, **values), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)
    still = bp(tmp_path / "constant", **{**values, "lr_schedule": "constant"})
    assert any(not torch.allclose(one, other, rtol=1e-5) for one, other in zip(still, expected, strict=True))


@pytest.mark.parametrize("kind", CLIPPING)
def test_gradients_are_clipped_as_in_the_plain_loop(kind: str, tmp_path: Path) -> None:
    values, clip = CLIPPING[kind]

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=LR, fused=True)

    expected = plain_bp(make, constant, clip)
    for found, value in zip(bp(tmp_path, optimizer="sgd", **values), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)
    assert any(
        not torch.allclose(one, other, rtol=1e-5) for one, other in zip(plain_bp(make, constant), expected, strict=True)
    )


CHANGES = {
    "one-cycle": {"lr_schedule": "one-cycle"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "lr_schedule": "step:1", "lr": 0.05},
    "clipped": {"clip_value": 1e-3, "clip_norm": 0.1, "betas": "0.8,0.9"},
}


@pytest.mark.parametrize("schedule", ["separate", "sequence"])
@pytest.mark.parametrize("method", ["mf", "lbp-gan"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_was_stopped_goes_on_at_the_right_rate(
    name: str, method: str, schedule: str, tmp_path: Path
) -> None:
    asked = settings(method, schedule=schedule, checkpoint_every=0.0, **CHANGES[name])
    whole = fit(asked, tmp_path / "whole", data=data("pixels").set)
    path = tmp_path / "cut"
    stopped_after(7, asked, path, data("pixels").set)
    stopped_after(12, asked, path, data("pixels").set, resume=True)
    fit(asked, path, data=data("pixels").set, resume=True)
    assert_same(units(path), units(whole.path))
    plain = {**CHANGES[name], "lr_schedule": "constant", "clip_value": None, "clip_norm": None}
    other = fit(asked.with_values(plain), tmp_path / "plain", data=data("pixels").set)
    assert not all(torch.equal(one, units(other.path)[key]) for key, one in weights_of(whole).items())


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in units(run.path).items() if "optim." not in name}


@pytest.mark.parametrize("name", ["one-cycle", "momentum"])
def test_tiles_learn_at_the_same_rate(name: str, tmp_path: Path) -> None:
    values = {**CHANGES[name], "clip_value": 1e-3, "epochs": 1, "net": "mlp:32x2"}
    whole, tiled = (
        fit(settings("mf", **values, **more), tmp_path / str(number), data=data("pixels").set)
        for number, more in enumerate(({}, {"tiles": 2}))
    )
    for key, value in weights_of(whole).items():
        torch.testing.assert_close(units(tiled.path)[key], value, rtol=1e-4, atol=1e-5)


def test_a_cell_that_is_clipped_by_its_norm_is_never_cut(tmp_path: Path) -> None:
    asked = {"net": "mlp:200", "batch_size": 4, "micro_batch": None}
    least = plan_job(open_job(settings("mf", **asked), data=data("pixels").set)).min_budget
    clipped = plan_job(open_job(settings("mf", **asked, clip_norm=1.0), data=data("pixels").set))
    assert all(cell.tiles == 1 and not cell.tileable for cell in clipped.cells)
    assert clipped.min_budget >= least
    with pytest.raises(InputError, match="--clip-norm needs the gradients of a whole cell, and --tiles"):
        plan_job(open_job(settings("mf", **asked, clip_norm=1.0, tiles=2), data=data("pixels").set))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"momentum": 0.9}, "--momentum is for --optimizer sgd; this run uses adam"),
        ({"nesterov": True}, "--nesterov is for --optimizer sgd"),
        ({"optimizer": "sgd", "nesterov": True}, "--nesterov needs --momentum"),
        ({"optimizer": "sgd", "momentum": 1.0}, "--momentum 1: expected a number from 0 to below 1"),
        ({"optimizer": "sgd", "betas": "0.9,0.99"}, "--betas is for adam, adamw and adamax"),
        ({"betas": "0.9"}, "--betas '0.9': expected two numbers"),
        ({"betas": "0.9,1"}, "expected two numbers from 0 to below 1"),
        ({"betas": "a,b"}, "expected two numbers"),
        ({"betas": "nan,0.9"}, "expected two numbers"),
        ({"lr_schedule": "cosin"}, "--lr-schedule 'cosin': expected constant"),
        ({"clip_norm": 0.0}, "--clip-norm is 0.0; expected more than 0"),
        ({"clip_value": -1.0}, "--clip-value is -1.0; expected more than 0"),
    ],
)
def test_what_the_optimizer_does_not_have_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        fit(settings("mf", **values), tmp_path / "run", data=data("pixels").set)
    assert not (tmp_path / "run").exists()
