"""Cells between their visits, on the device, the host and disk. ``pytest tests/stream/test_cells.py``."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import begin, flat, named, state_of

from edgetrain.errors import StorageError
from edgetrain.memory.meter import LiveMeter
from edgetrain.nets.spec import open_net
from edgetrain.objectives.base import nodes
from edgetrain.objectives.mf import MonoForward
from edgetrain.store.entries import Checkpoint
from edgetrain.store.run import RunFolder
from edgetrain.store.tensors import Spilled
from edgetrain.store.units import Kinds, UnitFiles
from edgetrain.stream.cell import Cell, ResidentCell, Setup
from edgetrain.stream.cells import CellStream
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.state import CellState, Tensors

CPU = torch.device("cpu")
NET = open_net("mlp:7x4;norm=batch;bias=1", (7,), {})
OBJECTIVE = MonoForward(3, NET.options)
NODES = nodes(list(NET.cells), NET.in_shape, seed=5)
CELL_BYTES = 1500  # a little more than a trained cell's state


class Placer:
    """Makes cells, and remembers from what."""

    def __init__(self, optimizer: str = "adam"):
        self.optimizer = OptimizerRecipe(optimizer, 0.01)
        self.given: list[CellState | None] = []

    def __call__(self, index: int, state: CellState | None) -> ResidentCell:
        self.given.append(state)
        return ResidentCell(NODES[index], Setup(OBJECTIVE, self.optimizer, CPU), state)


def stream(folder: RunFolder, host_bytes: int, keep: bool = False, placer: Placer | None = None) -> CellStream:
    return CellStream(placer or Placer(), CPU, LiveMeter(), folder.units, host_bytes, keep)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create(begin())
    return made


def train(cell: Cell, seed: int) -> None:
    """A step that changes weights, optimizer state and running statistics."""
    assert isinstance(cell, ResidentCell)
    cell.set_training(True)
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
    assert cell.head is not None
    cell.head(cell.module(x)).square().sum().backward()
    for _, learned, optimizer in cell.phases:
        optimizer.step()
        for parameter in learned:
            parameter.grad = None


def weights(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith("optim.")}


def snapshot(cell: Cell) -> Tensors:
    return flat(cell.state_dict())


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def read(folder: RunFolder, content: CellState | Spilled) -> Tensors:
    return named(folder.units.unspill(content)) if isinstance(content, Spilled) else flat(content)


def saved_state(folder: RunFolder, unit: str, optimizer: bool) -> CellState:
    return CellState.of_kinds(folder.units.read(folder.files()[unit], optimizer))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    host_bytes=st.integers(0, 5 * CELL_BYTES),
    keep=st.booleans(),
    optimizer=st.sampled_from(["adam", "adamw", "adamax", "sgd"]),
    program=st.lists(
        st.tuples(st.sampled_from(["visit", "visit", "look", "expect", "leave", "checkpoint"]), st.integers(0, 3)),
        max_size=25,
    ),
)
def test_a_cell_comes_back_bit_for_bit_wherever_it_was(
    host_bytes: int, keep: bool, optimizer: str, program: list[tuple[str, int]], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(begin())
    cells = stream(folder, host_bytes, keep, Placer(optimizer))
    known: dict[int, Tensors] = {}
    checkpoints = 0
    for number, (what, index) in enumerate(program):
        if what == "visit":
            cell = cells.visit(index)
            if index in known:
                assert_equal(snapshot(cell), known[index])
            train(cell, number)
            known[index] = snapshot(cell)
        elif what == "look":
            seen = cells.visit(index, changes=False).state_dict()
            if index in known:
                assert_equal(flat(seen.without_optimizer()), weights(known[index]))
                assert not seen.optimizer or seen.optimizer.keys() == set(state_of(known[index]).optimizer)
        elif what == "expect":
            cells.expect(index, changes=number % 2 == 0)
        elif what == "leave":
            cells.leave()
        else:
            cells.leave()
            checkpoints = number + 1
            checkpoint(folder, cells, checkpoints)
            assert cells.dirty() == []
            for name, kinds in folder.files().items():
                assert_equal(named(folder.units.read(kinds)), known[int(name)])
    cells.leave()
    for index in cells.dirty():
        assert_equal(read(folder, cells.content(index)), known[index])
    for index, state in known.items():
        assert_equal(snapshot(cells.visit(index)), state)
    cells.close()
    if folder.units.scratch.exists():
        assert list(folder.units.scratch.iterdir()) == []
    folder.clear()


def checkpoint(folder: RunFolder, cells: CellStream, number: int) -> None:
    """As the trainer does it."""

    def changed() -> Iterator[tuple[str, Kinds | Spilled]]:
        for index in cells.dirty():
            content = cells.content(index)
            yield f"{index:03}", content if isinstance(content, Spilled) else content.to_kinds()

    folder.save(Checkpoint(number=number), changed())
    for name in folder.files():
        cells.saved(int(name), partial(saved_state, folder, name), needed=True)


def test_the_first_visit_draws_first_weights_and_later_ones_take_the_state(folder: RunFolder) -> None:
    placer = Placer()
    cells = stream(folder, 0, placer=placer)
    cells.visit(0)
    cells.visit(1)
    cells.visit(0)
    assert [state is None for state in placer.given] == [True, True, False]
    cells.close()


def test_staying_with_a_cell_does_not_move_it(folder: RunFolder) -> None:
    placer = Placer()
    cells = stream(folder, 0, placer=placer)
    assert cells.visit(0) is cells.visit(0)
    assert len(placer.given) == 1
    cells.close()


def test_cells_that_are_kept_stay_where_they_are(folder: RunFolder) -> None:
    cells = stream(folder, 0, keep=True)
    first = cells.visit(0)
    cells.visit(1)
    cells.leave()
    assert cells.visit(0) is first
    assert not folder.units.scratch.exists()
    cells.close()


def test_only_one_cell_is_on_the_device(folder: RunFolder) -> None:
    meter = LiveMeter(full=True)
    cells = CellStream(Placer(), CPU, meter, folder.units, 1 << 20, False)
    alive = []
    for index in (0, 1, 2, 3, 0):
        cells.visit(index)
        with meter.watch():
            alive.append(meter.tracker.live)
    assert alive[0] > 0
    assert len(set(alive)) == 1
    cells.leave()
    assert meter.tracker.live == 0
    cells.close()


def test_the_host_tier_is_filled_before_the_disk_and_not_beyond_its_size(folder: RunFolder) -> None:
    cells = stream(folder, 2 * CELL_BYTES)
    sizes = []
    for index in range(4):
        cell = cells.visit(index)
        train(cell, index)
        sizes.append(cell.state_dict().size)
    cells.leave()
    assert max(sizes) <= CELL_BYTES < 1.5 * min(sizes)
    waiting = {path.name.partition(".")[0] for path in folder.units.scratch.iterdir()}
    assert waiting == {"002", "003"}
    assert not isinstance(cells.content(0), Spilled)
    cells.close()
    assert list(folder.units.scratch.iterdir()) == []


def test_with_room_for_all_nothing_touches_the_disk(folder: RunFolder) -> None:
    cells = stream(folder, 1 << 20)
    for index in (0, 1, 2, 3, 0, 1):
        train(cells.visit(index), index)
    cells.leave()
    assert not folder.units.scratch.exists()
    assert folder.usage.written == 0
    cells.close()


def test_an_expected_cell_is_read_once_in_another_thread(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[str] = []
    real = UnitFiles.unspill

    def unspill(self: UnitFiles, spilled: Spilled, optimizer: bool = True) -> Any:
        readers.append(threading.current_thread().name)
        return real(self, spilled, optimizer)

    monkeypatch.setattr(UnitFiles, "unspill", unspill)
    cells = stream(folder, 0)
    train(cells.visit(0), 0)
    expected = snapshot(cells.visit(0))
    cells.visit(1)
    cells.expect(0)
    cells.expect(0)
    cells.expect(1)  # it is here
    cells.expect(3)  # nobody knows it yet
    assert_equal(snapshot(cells.visit(0)), expected)
    assert len(readers) == 1
    assert readers[0].startswith("edgetrain-cells")
    cells.close()


def test_a_saved_cell_is_read_from_its_checkpoint(folder: RunFolder) -> None:
    cells = stream(folder, 0)
    train(cells.visit(0), 0)
    expected = snapshot(cells.visit(0))
    cells.leave()
    checkpoint(folder, cells, 1)
    assert list(folder.units.scratch.iterdir()) == []
    cells.expect(0)
    assert_equal(snapshot(cells.visit(0)), expected)
    assert cells.dirty() == [0]  # a visit changes it
    cells.close()
    assert_equal(named(folder.units.read(folder.files()["000"])), expected)


def test_a_saved_cell_that_is_not_needed_leaves_the_host_tier(folder: RunFolder) -> None:
    cells = stream(folder, CELL_BYTES)
    train(cells.visit(0), 0)
    expected = snapshot(cells.visit(0))
    cells.leave()
    content = cells.content(0)
    folder.save(Checkpoint(number=1), [("000", content if isinstance(content, Spilled) else content.to_kinds())])
    cells.saved(0, partial(saved_state, folder, "000"), needed=False)
    train(cells.visit(1), 1)
    cells.leave()
    assert not folder.units.scratch.exists()  # there is room again
    assert_equal(snapshot(cells.visit(0)), expected)
    cells.close()


def test_a_cell_that_is_being_read_ahead_may_be_saved_meanwhile(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A visit shorter than the reading of the next cell, with a checkpoint behind it."""
    slow, real = threading.Event(), UnitFiles.unspill

    def unspill(self: UnitFiles, spilled: Spilled, optimizer: bool = True) -> Any:
        slow.wait(0.2)
        return real(self, spilled, optimizer)

    monkeypatch.setattr(UnitFiles, "unspill", unspill)
    cells = stream(folder, 0)
    train(cells.visit(0), 0)
    expected = snapshot(cells.visit(0))
    train(cells.visit(1), 1)
    cells.expect(0)
    cells.leave()
    checkpoint(folder, cells, 1)
    try:
        assert_equal(snapshot(cells.visit(0)), expected)
    finally:
        cells.close()


def test_a_full_disk_is_a_storage_error(folder: RunFolder) -> None:
    (folder.path / "scratch").write_text("a file where the folder should be")
    cells = stream(folder, 0)
    cells.visit(0)
    with pytest.raises(StorageError, match="scratch"):
        cells.leave()


def test_closing_ends_the_reader(folder: RunFolder) -> None:
    cells = stream(folder, 0)
    for index in (0, 1):
        cells.visit(index)
    cells.expect(0)
    cells.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("edgetrain-cells")]
