"""What lives when, by kind. ``pytest tests/memory/test_timeline.py``."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetrain.memory.meter import LiveBytes
from edgetrain.memory.timeline import Timeline, making, thinned
from edgetrain.record import KINDS


def at_peak(timeline: Timeline) -> dict[str, int]:
    live = timeline.bytes_by_kind()
    return {kind: size for kind, size in zip(KINDS, live[live.sum(1).argmax()].tolist(), strict=True) if size}


def test_what_outlives_its_scope_is_of_its_kind_and_the_rest_is_workspace() -> None:
    timeline = Timeline()
    with LiveBytes(timeline):
        with making("activations"):
            kept = torch.zeros(100)
            gone = torch.zeros(50)
            del gone
        loose = torch.zeros(25)
        del loose
    live = timeline.bytes_by_kind()
    activations, workspace = KINDS.index("activations"), KINDS.index("workspace")
    assert live[:, activations].tolist() == [400, 400, 400, 400, 400]
    assert live[:, workspace].tolist() == [0, 200, 0, 100, 0]
    assert timeline.peak == 600
    assert timeline.peak_phase == "in the forward pass"
    del kept
    assert timeline.bytes_by_kind()[-1].sum() == 0
    assert timeline.bytes_by_kind()[0, activations] == 400  # it goes in another scope, and stays what it was


def test_the_innermost_scope_counts() -> None:
    timeline = Timeline()
    with LiveBytes(timeline), making("weights"):
        with making("latents"):
            inner = torch.zeros(10)
        outer = torch.zeros(20)
    assert at_peak(timeline) == {"latents": 40, "weights": 80}
    del inner, outer


def test_scopes_belong_to_their_thread() -> None:
    timeline = Timeline()

    def elsewhere() -> None:
        with making("weights"):
            entered.set()
            leave.wait(10)

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    entered.wait(10)
    with LiveBytes(timeline), making("latents"):
        kept = torch.zeros(10)
    leave.set()
    thread.join()
    assert at_peak(timeline) == {"latents": 40}
    del kept


def test_a_training_step_of_a_linear_map_by_hand() -> None:
    inputs, outputs, batch, timeline = 30, 20, 8, Timeline()
    with LiveBytes(timeline):
        with making("weights"):
            layer = nn.Linear(inputs, outputs, bias=False)
        with making("latents"):
            x = torch.ones(batch, inputs)
        optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        for _ in range(2):
            with making("activations"):
                loss = layer(x).relu().sum()
            with making("gradients"):
                loss.backward()
            del loss
            with making("optimizer state"):
                optimizer.step()
            layer.weight.grad = None
    weights = 4 * inputs * outputs
    live = timeline.bytes_by_kind()
    most = dict(zip(KINDS, live.max(0).tolist(), strict=True))
    assert most["weights"] == weights
    assert most["gradients"] == weights
    assert most["optimizer state"] == 2 * weights + 4  # two moments and a count
    assert most["latents"] == 4 * batch * inputs
    assert most["activations"] == 4 * batch * outputs + 4  # relu keeps its result, and the loss
    last = dict(zip(KINDS, live[-1].tolist(), strict=True))
    assert last["gradients"] == last["activations"] == last["workspace"] == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    series=st.lists(st.lists(st.integers(0, 99), min_size=6, max_size=6), min_size=1, max_size=60),
    points=st.integers(1, 40),
)
def test_a_thinned_series_keeps_order_and_peak(series: list[list[int]], points: int) -> None:
    whole = np.array(series, np.int64)
    kept = thinned(whole, points)
    assert len(kept) == min(points, len(whole))
    assert kept.sum(1).max() == whole.sum(1).max()
    rows = iter(whole.tolist())
    assert all(any(row == other for other in rows) for row in kept.tolist())  # a subsequence


def test_a_kind_that_nobody_knows_is_no_kind() -> None:
    timeline = Timeline()
    with LiveBytes(timeline), making("wights"):  # type: ignore[arg-type]
        kept = torch.zeros(10)
    with pytest.raises(ValueError, match="not in tuple"):
        timeline.bytes_by_kind()
    del kept
