"""The order of visits, without a tensor. ``pytest tests/planning/test_schedule.py``."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgetrain
from edgetrain.planning.schedule import SCHEDULES, Cut, Visit

ROOT = Path(edgetrain.__file__).parents[1]
INPUTS = 0

Run = tuple[
    str, int, int, int, int, tuple[int, ...]
]  # schedule, depth, epochs, steps, classifier epochs, what it reads


@st.composite
def runs(draw: st.DrawFn) -> Run:
    name = draw(st.sampled_from(["separate", "sequence"]))
    epochs = draw(st.integers(1, 4))
    classifier = draw(st.sampled_from([0, epochs]) if name == "sequence" else st.integers(0, 4))
    depth = draw(st.integers(1, 7))
    some = st.sets(st.integers(0, depth - 1), min_size=1).map(lambda nodes: tuple(sorted(nodes)))
    read = draw(st.sampled_from([tuple(range(depth)), (depth - 1,)]) | some) if classifier else ()
    return name, depth, epochs, draw(st.integers(1, 9)), classifier, read


def visits(run: Run) -> list[Visit]:
    name, depth, epochs, steps, classifier, read = run
    return list(SCHEDULES[name](depth, epochs, steps, classifier, read))


def reads(visit: Visit, run: Run) -> list[int]:
    """Numbers of the latents that a visit reads."""
    return [node + 1 for node in run[5]] if visit.node == run[1] else [visit.node]


checked = settings(max_examples=150, deadline=None, derandomize=True)


def test_importing_the_schedules_does_not_import_torch() -> None:
    code = "import edgetrain.planning.schedule, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split()[0] == "False"


@checked
@given(run=runs())
def test_every_step_of_every_node_is_done_once_and_in_order(run: Run) -> None:
    _, depth, epochs, steps, classifier, _ = run
    done: dict[int, list[tuple[int, int]]] = {}
    for visit in visits(run):
        done.setdefault(visit.node, []).extend((visit.epoch, step) for step in range(visit.first, visit.last))
    for node in range(depth):
        assert done.pop(node) == [(epoch, step) for epoch in range(epochs) for step in range(steps)]
    expected = [(epoch, step) for epoch in range(classifier) for step in range(steps)]
    assert done.pop(depth, []) == expected
    assert done == {}


@checked
@given(run=runs())
def test_latents_are_emitted_before_they_are_read_and_not_freed_in_between(run: Run) -> None:
    name, depth, *_ = run
    there: dict[int, Visit | None] = {INPUTS: None}
    for visit in visits(run):
        for index in reads(visit, run):
            assert index in there
            source = there[index]
            if name == "sequence" and source is not None:
                assert source.emit == "training"
                assert source.epoch == visit.epoch  # in the order of this very epoch
            if name == "separate" and source is not None:
                assert source.emit == "finished"
                assert source.final
        if visit.emit != "none":
            assert visit.node < depth
            there[visit.node + 1] = visit
        for index in visit.frees:
            assert index in there  # nothing is freed twice
            del there[index]


@checked
@given(run=runs())
def test_latents_that_nobody_will_read_are_never_emitted(run: Run) -> None:
    order = visits(run)
    for number, visit in enumerate(order):
        if visit.emit == "none":
            continue
        later = order[number + 1 :]
        again = next((at for at, other in enumerate(later) if other.node == visit.node), len(later))
        assert any(visit.node + 1 in reads(other, run) for other in later[:again])


@checked
@given(run=runs())
def test_latents_are_freed_as_soon_as_their_last_reader_is_done(run: Run) -> None:
    order = visits(run)
    for number, visit in enumerate(order):
        for index in set(reads(visit, run)) - {INPUTS}:
            later = order[number + 1 :]
            emitted = next((at for at, o in enumerate(later) if o.emit != "none" and o.node + 1 == index), len(later))
            needed = any(index in reads(other, run) for other in later[:emitted])
            assert (index in visit.frees) == (not needed)


@checked
@given(run=runs())
def test_no_cache_is_left_at_the_end(run: Run) -> None:
    held: set[int] = set()
    for visit in visits(run):
        if visit.emit != "none":
            held.add(visit.node + 1)
        held -= set(visit.frees)
    assert held == set()


@checked
@given(run=runs())
def test_each_node_is_finished_once_and_by_its_last_visit(run: Run) -> None:
    _, depth, _, _, classifier, _ = run
    order = visits(run)
    for node in range(depth + (classifier > 0)):
        own = [visit.final for visit in order if visit.node == node]
        assert own == [False] * (len(own) - 1) + [True]


@checked
@given(run=runs())
def test_at_a_frontier_nothing_is_needed_that_only_an_unfinished_cell_could_have_emitted(run: Run) -> None:
    order = visits(run)
    assert order[-1].frontier
    for number, visit in enumerate(order):
        finished = {other.node for other in order[: number + 1] if other.final}
        again, lost = {INPUTS}, False
        for later in order[number + 1 :]:
            for index in reads(later, run):
                remade = index in again or (index - 1) in finished
                lost = lost or not remade
            if later.emit != "none":
                again.add(later.node + 1)
        assert visit.frontier == (not lost) or (not visit.frontier and is_last_epoch(visit, order))


def is_last_epoch(visit: Visit, order: list[Visit]) -> bool:
    """In the last epoch of a sequence all cells before are finished; a checkpoint there is not asked for."""
    return visit.final and order[-1].epoch == visit.epoch


@checked
@given(run=runs())
def test_a_cell_that_emits_for_good_is_finished(run: Run) -> None:
    for visit in visits(run):
        if visit.emit == "finished":
            assert visit.final


# -- latents that the disk cannot hold ------------------------------------------------------------------


@st.composite
def cuts(draw: st.DrawFn, run: Run) -> Cut:
    name, depth, _, steps, _, _ = run
    ranges = draw(st.integers(1, steps))
    if name == "sequence":
        return Cut(ranges)
    return Cut(ranges, frozenset({0, *draw(st.sets(st.integers(1, depth)))}))


def cut_runs() -> st.SearchStrategy[tuple[Run, Cut]]:
    return runs().flatmap(lambda run: st.tuples(st.just(run), cuts(run)))


def cut_visits(run: Run, cut: Cut) -> list[Visit]:
    name, depth, epochs, steps, classifier, read = run
    return list(SCHEDULES[name](depth, epochs, steps, classifier, read, cut))


class Disk:
    """Which rows of which latents are there: of steps (epoch, step) or of samples."""

    def __init__(self, run: Run):
        self.run, self.held = run, {INPUTS: {("sample", step) for step in range(run[3])}}

    def carry_out(self, visit: Visit) -> None:
        steps = range(visit.first, visit.last)
        in_order = {("epoch", visit.epoch, step) for step in steps}
        every = {("sample", step) for step in range(self.run[3])}
        for index in reads(visit, self.run):
            samples = {("sample", step) for step in steps} if visit.emit in ("onward", "cached") else every
            assert self.held[index] >= samples or (
                visit.emit not in ("onward", "cached") and self.held[index] == in_order
            )
        if visit.emit in ("training", "again"):
            self.held[visit.node + 1] = in_order
        elif visit.emit == "finished":
            self.held[visit.node + 1] = every
        elif visit.emit == "onward":
            self.held[visit.node + 1] = {("sample", step) for step in steps}
        elif visit.emit == "cached":
            known = self.held.get(visit.node + 1, set()) if visit.first else set()
            self.held[visit.node + 1] = known | {("sample", step) for step in steps}
        for index in visit.frees:
            del self.held[index]


@checked
@given(given=cut_runs())
def test_with_a_cut_every_step_is_trained_once_in_order_from_latents_that_are_there(given: tuple[Run, Cut]) -> None:
    run, cut = given
    _, depth, epochs, steps, classifier, _ = run
    done: dict[int, list[tuple[int, int]]] = {}
    disk = Disk(run)
    for visit in cut_visits(run, cut):
        disk.carry_out(visit)
        if visit.trains:
            done.setdefault(visit.node, []).extend((visit.epoch, step) for step in range(visit.first, visit.last))
    for node in range(depth):
        assert done.pop(node) == [(epoch, step) for epoch in range(epochs) for step in range(steps)]
    assert done.pop(depth, []) == [(epoch, step) for epoch in range(classifier) for step in range(steps)]
    assert set(disk.held) <= {INPUTS}


@checked
@given(given=cut_runs())
def test_with_a_cut_a_run_goes_on_from_every_frontier(given: tuple[Run, Cut]) -> None:
    run, cut = given
    order = cut_visits(run, cut)
    assert order[-1].frontier
    for number in [number for number, visit in enumerate(order, 1) if visit.frontier]:
        disk = Disk(run)
        for visit in order[:number]:
            if visit.lasting:
                disk.carry_out(replace(visit, frees=()))
            for index in visit.frees:
                disk.held.pop(index, None)
        for visit in order[number:]:
            disk.carry_out(visit)


@checked
@given(given=cut_runs())
def test_only_finished_cells_emit_again(given: tuple[Run, Cut]) -> None:
    finished = set()
    for visit in cut_visits(*given):
        assert visit.trains or visit.node in finished
        if visit.final:
            finished.add(visit.node)


def test_a_separate_run_reads_as_in_the_paper() -> None:
    order = [(visit.node, visit.epoch, visit.emit) for visit in SCHEDULES["separate"](2, 2, 5, 1, (0, 1))]
    assert order == [
        (0, 0, "none"),
        (0, 1, "finished"),
        (1, 0, "none"),
        (1, 1, "finished"),
        (2, 0, "none"),
    ]


def test_a_sequence_reads_as_in_the_paper() -> None:
    order = [(visit.node, visit.epoch, visit.emit) for visit in SCHEDULES["sequence"](2, 2, 5, 2, (0, 1))]
    epoch = [(0, "training"), (1, "training"), (2, "none")]
    assert order == [(node, number, emit) for number in range(2) for node, emit in epoch]


def test_a_classifier_of_the_last_latents_leaves_the_others_to_be_freed_early() -> None:
    for name, emit in (("separate", "finished"), ("sequence", "training")):
        order = list(SCHEDULES[name](3, 1, 5, 1, (2,)))
        assert [(visit.node, visit.emit, visit.frees) for visit in order] == [
            (0, emit, (0,) if name == "separate" else ()),
            (1, emit, (1,)),
            (2, emit, (2,)),
            (3, "none", (3,)),
        ]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_of_a_million_visits_is_not_made_at_once(name: str) -> None:
    order = SCHEDULES[name](10**9, 10**9, 10**9, 0, ())
    assert next(order).epoch == 0


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9))
def test_streamed_layers_are_one_visit_of_the_last_in_each_epoch(depth: int, epochs: int, steps: int) -> None:
    order = list(SCHEDULES["streamed"](depth, epochs, steps, 0, ()))
    assert [(visit.node, visit.epoch, visit.first, visit.last) for visit in order] == [
        (depth - 1, epoch, 0, steps) for epoch in range(epochs)
    ]
    assert [visit.final for visit in order] == [False] * (epochs - 1) + [True]
    assert all(visit.frontier and visit.trains and not visit.frees for visit in order)
