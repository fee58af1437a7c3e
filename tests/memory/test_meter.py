"""Live bytes of the device side against the profiler. ``pytest tests/memory/test_meter.py``."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from edgetrain.memory.meter import WATCHED_REPEATS, LiveBytes, LiveMeter, meter_of

FLOAT = 4


class Steps:
    """A dense MF cell: made, and trained for a number of steps, with nothing alive outside."""

    def __init__(self, d_in: int, units: int, batch: int, classes: int, fused: bool = True):
        self.sizes = d_in, units, batch, classes
        self.fused = fused

    def __call__(self, steps: int = 2, scope: Callable[[], Any] | None = None) -> None:
        d_in, units, batch, classes = self.sizes
        weight = nn.Parameter(torch.empty(units, d_in).fill_(0.01))
        projection = nn.Parameter(torch.empty(classes, units).fill_(0.02))
        optimizer = torch.optim.Adam([weight, projection], fused=self.fused, foreach=False)
        for _ in range(steps):
            x = torch.empty(batch, d_in).fill_(1.0)
            y = torch.empty(batch, dtype=torch.int64).fill_(1)
            a = torch.nn.functional.linear(x, weight).relu_()
            loss = cross_entropy(a @ projection.T, y, reduction="sum") / batch
            del a
            loss.backward(inputs=[weight, projection])
            del x, y, loss
            optimizer.step()
            weight.grad = projection.grad = None


def profiled_peak(work: Callable[[], None]) -> int:
    """The oracle: the highest sum of the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    result = found.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in result.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def metered(work: Callable[[], None]) -> LiveBytes:
    gc.collect()
    with LiveBytes() as tracker:
        work()
    return tracker


@pytest.mark.parametrize(("d_in", "units", "batch"), [(64, 128, 16), (100, 100, 256), (784, 50, 1), (3, 500, 64)])
def test_a_dense_step_peaks_as_the_profiler_says(d_in: int, units: int, batch: int) -> None:
    work = Steps(d_in, units, batch, 10)
    work()  # warm: kernels, threads
    expected = profiled_peak(work)
    found = metered(work).peak
    assert abs(found - expected) <= 64


def test_a_step_without_a_fused_optimizer_is_a_few_bytes_apart() -> None:
    work = Steps(64, 128, 16, 10, fused=False)
    work()
    assert abs(metered(work).peak - profiled_peak(work)) <= 64


def test_the_closed_form_of_a_dense_cell_is_met() -> None:
    d_in, units, batch, classes = 100, 80, 32, 10
    parameters = units * (d_in + classes)
    found = metered(Steps(d_in, units, batch, classes)).peak
    closed = 16 * parameters + FLOAT * batch * (d_in + units) + 8 * batch + 20
    assert found == pytest.approx(closed, abs=600)


def test_counting_is_deterministic() -> None:
    work = Steps(64, 128, 16, 10)
    assert len({metered(work).peak for _ in range(3)}) == 1


def test_everything_that_died_is_given_back() -> None:
    tracker = metered(Steps(30, 20, 8, 5))
    assert tracker.peak > 0
    assert tracker.live == 0


def test_views_and_in_place_results_do_not_count_again() -> None:
    with LiveBytes() as tracker:
        base = torch.zeros(10, 10)
        kept = [base.T, base[3:], base.view(-1), base.detach(), base.add_(1), base.expand(4, 10, 10)]
        assert tracker.live == tracker.peak == 400
        del base
        assert tracker.live == 400  # the views hold the storage
        del kept
        assert tracker.live == 0


def test_a_copy_counts() -> None:
    with LiveBytes() as tracker:
        base = torch.zeros(10)
        held = [base.clone(), torch.cat([base, base])]
        assert tracker.live == 40 + 40 + 80
        del held, base


def test_what_is_made_in_the_host_scope_does_not_count() -> None:
    tracker = LiveBytes()
    with tracker:
        with tracker.host():
            buffer = torch.zeros(1000)
            with tracker.host():
                inner = torch.ones(10)
            after = torch.ones(10)  # the outer scope still holds
        view = buffer[3:]
        assert tracker.live == tracker.peak == 0
        copy = torch.empty(1000).copy_(buffer)
        assert tracker.live == 4000
    assert len(inner) + len(after) + len(view) + len(copy) == 1020 + 997


def test_what_enters_from_outside_is_the_hosts() -> None:
    outside = torch.zeros(1000)
    with LiveBytes() as tracker:
        view = outside[1:]
        assert tracker.live == 0
        made = outside + 1
        assert tracker.live == 4000
        del view, made


def test_the_host_scope_ends_when_its_body_fails() -> None:
    tracker = LiveBytes()
    with tracker:
        with pytest.raises(KeyError), tracker.host():
            raise KeyError
        made = torch.zeros(5)
        assert tracker.live == 20
        del made


def test_the_peak_is_kept_and_can_begin_anew() -> None:
    with LiveBytes() as tracker:
        kept = torch.zeros(5)
        large = torch.zeros(100)
        del large
        assert (tracker.live, tracker.peak) == (20, 420)
        assert "zeros" in tracker.peak_operation
        tracker.reset_peak()
        assert (tracker.live, tracker.peak) == (20, 20)
        del kept


def test_empty_tensors_cost_nothing() -> None:
    with LiveBytes() as tracker:
        made = [torch.zeros(0), torch.zeros(3, 0)]
        assert tracker.live == tracker.peak == 0
    assert len(made) == 2


def test_a_death_while_nobody_watches_is_seen() -> None:
    tracker = LiveBytes()
    with tracker:
        held = torch.zeros(100)
        kept = torch.zeros(10)
    del held
    assert tracker.live == 40
    unseen = torch.zeros(1000)
    with tracker:
        seen = torch.zeros(1)
        assert tracker.live == 44
    assert len(unseen) + len(seen) + len(kept) == 1011


class Ledger:
    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.live = self.peak = self.events = 0

    def alloc(self, key: int, size: int) -> None:
        assert key not in self.sizes
        assert size > 0
        self.sizes[key] = size
        self.live += size
        self.events += 1
        self.peak = max(self.peak, self.live)

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def test_a_listener_hears_each_storage_come_and_go() -> None:
    ledger = Ledger()
    with LiveBytes(ledger) as tracker:
        Steps(30, 20, 8, 5)()
    assert ledger.events > 20
    assert ledger.peak == tracker.peak
    assert ledger.sizes == {}
    assert ledger.live == tracker.live == 0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    program=st.lists(
        st.tuples(st.sampled_from(["make", "view", "copy", "host", "drop"]), st.integers(0, 20)), max_size=25
    )
)
def test_live_bytes_are_those_of_the_storages_that_live(program: list[tuple[str, int]]) -> None:
    held: list[tuple[torch.Tensor, int]] = []  # a tensor, and the number of its storage
    sizes: dict[int, int] = {}
    peak = 0
    ledger = Ledger()
    with LiveBytes(ledger) as tracker:
        for number, (what, size) in enumerate(program):
            source = held[size % len(held)] if held else None
            if what == "make":
                sizes[number] = FLOAT * size
                held.append((torch.empty(size), number))
            elif what == "host":
                sizes[number] = 0
                with tracker.host():
                    held.append((torch.empty(size), number))
            elif what == "view" and source is not None:
                held.append((source[0][1:] if len(source[0]) else source[0].view(-1), source[1]))
            elif what == "copy" and source is not None:
                sizes[number] = FLOAT * len(source[0])
                held.append((source[0].clone(), number))
            elif what == "drop" and held:
                held.pop(size % len(held))
            source = None
            live = sum(sizes[storage] for storage in {storage for _, storage in held})
            peak = max(peak, live)
            assert tracker.live == ledger.live == live
        assert tracker.peak == peak
        held.clear()
        assert tracker.live == 0


# --- LiveMeter --------------------------------------------------------------------------------


def watched(meter: LiveMeter, kind: object, size: int) -> bool:
    """Whether a scope of this kind is measured."""
    meter.tracker.reset_peak()
    with meter.watch(kind):  # type: ignore[arg-type]
        made = torch.zeros(size)
        del made
    return meter.cell_peak >= FLOAT * size


def test_the_first_steps_of_each_kind_are_watched() -> None:
    meter = LiveMeter()
    assert [watched(meter, "train", 10) for _ in range(4)] == [True] * WATCHED_REPEATS + [False] * 2
    assert watched(meter, ("train", 3), 10)  # a short last batch is another kind
    assert watched(meter, None, 10)
    meter.start_cell(0)
    assert watched(meter, "train", 10)


def test_a_full_meter_watches_every_step() -> None:
    meter = LiveMeter(full=True)
    assert all(watched(meter, "train", 10) for _ in range(5))


def test_nested_scopes_are_one() -> None:
    meter = LiveMeter()
    with meter.watch():
        with meter.watch("inner"):
            made = torch.zeros(10)
        after = torch.zeros(10)
    assert meter.cell_peak == 80
    assert len(made) + len(after) == 20


def test_a_failing_scope_ends_watching() -> None:
    meter = LiveMeter()
    with pytest.raises(KeyError), meter.watch():
        raise KeyError
    unseen = torch.zeros(10)
    assert meter.cell_peak == 0
    with meter.watch():
        seen = torch.zeros(1)
    assert meter.cell_peak == 4
    assert len(unseen) + len(seen) == 11


def trained(meter: LiveMeter, steps: int) -> tuple[int, int]:
    """Bytes alive after steps of a cell under a meter, and the peak."""
    with meter.watch():
        weight = nn.Parameter(torch.zeros(20, 30))
        optimizer = torch.optim.Adam([weight], fused=True)
    for _ in range(steps):
        with meter.watch("train"):
            x = torch.zeros(8, 30)
            (x @ weight.T).relu().sum().backward()
            optimizer.step()
            weight.grad = None
            del x
    with meter.watch():
        extra = torch.zeros(1)
        found = meter.tracker.live
        del extra
    return found, meter.cell_peak


def test_steps_that_are_not_watched_do_not_spoil_the_count() -> None:
    assert trained(LiveMeter(), 7) == trained(LiveMeter(full=True), 7) == trained(LiveMeter(), 2)


def test_the_cpus_meter_counts_live_bytes() -> None:
    meter = meter_of(torch.device("cpu"), full=True)
    assert isinstance(meter, LiveMeter)
    assert all(watched(meter, "x", 5) for _ in range(4))
