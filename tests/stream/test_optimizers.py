"""Learning-rate schedules against PyTorch's. ``pytest tests/stream/test_optimizers.py``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedulers

from edgetrain.errors import InputError
from edgetrain.stream.optimizers import SCHEDULES, LearningRate

LR = 0.3
TOTALS = [1, 2, 3, 7, 10, 40, 333]


def rates(text: str, steps: int, epochs: int = 1) -> list[float]:
    schedule = LearningRate.parse(text)
    return [LR * schedule.factor(step, steps, epochs) for step in range(steps)]


def of_torch(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, found = make(optimizer), []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return found


@pytest.mark.parametrize("steps", TOTALS)
def test_cosine_is_that_of_pytorch(steps: int) -> None:
    expected = of_torch(lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=steps), steps)
    assert rates("cosine", steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [steps for steps in TOTALS if steps > 4])
def test_one_cycle_is_that_of_pytorch(steps: int) -> None:
    expected = of_torch(
        lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=LR, total_steps=steps, cycle_momentum=False), steps
    )
    assert rates("one-cycle", steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("text", "milestones", "gamma"), [("step:2,5", [2, 5], 0.1), ("step:3:0.25", [3], 0.25)])
def test_steps_are_those_of_pytorch_at_the_ends_of_epochs(text: str, milestones: list[int], gamma: float) -> None:
    epochs = of_torch(lambda optimizer: schedulers.MultiStepLR(optimizer, milestones, gamma), 7)
    expected = [rate for rate in epochs for _ in range(6)]
    assert rates(text, 7 * 6, 7) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_linear_warmup_rises_in_its_share_of_the_steps_and_falls_to_nothing(share: float) -> None:
    found = rates(f"linear-warmup:{share}", 100)
    top = round(100 * share)
    assert found[top] == pytest.approx(LR)
    assert all(before < after for before, after in zip(found[:top], found[1 : top + 1], strict=True))
    assert all(before > after for before, after in zip(found[top:], found[top + 1 :], strict=False))
    assert found[-1] == pytest.approx(LR / (100 - top))


@given(
    st.sampled_from(["constant", "cosine", "one-cycle", "step:1,3", "linear-warmup"]),
    st.integers(1, 400),
    st.integers(1, 9),
)
def test_rates_are_between_nothing_and_the_greatest_for_every_length(text: str, steps: int, epochs: int) -> None:
    schedule = LearningRate.parse(text)
    found = [schedule.factor(step, steps * epochs, epochs) for step in range(steps * epochs)]
    assert all(math.isfinite(factor) and 0 <= factor <= 1 + 1e-12 for factor in found)


@pytest.mark.parametrize(
    "text",
    ["", "cosin", "cosine:3", "step", "step:", "step:0", "step:5,3", "step:3:1", "step:3:0.1:2", "step:a",
     "linear-warmup:1", "linear-warmup:x", "one-cycle:0.3", "step:3,3", "step:1:nan"],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(
        InputError, match=r"--lr-schedule .*: expected constant, cosine, one-cycle, step:EPOCH"
    ) as found:
        LearningRate.parse(text)
    assert "\n" not in str(found.value)


def test_a_typo_is_answered_with_the_nearest_schedule() -> None:
    with pytest.raises(InputError, match="did you mean 'one-cycle'"):
        LearningRate.parse("onecycle")
    assert {LearningRate.parse(text).kind for text in (*SCHEDULES[:3], "step:1", "linear-warmup")} == set(SCHEDULES)
