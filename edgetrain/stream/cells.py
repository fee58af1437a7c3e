"""Cells between their visits: on the device, in the host tier, or on disk.

A cell that leaves the device goes to the host tier while that has room. When it has none the cell
that just left goes to disk, not an older one: visits go round, so it is the one needed last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch

from edgetrain.memory import queues
from edgetrain.memory.host import give_back_free_memory
from edgetrain.memory.meter import Meter
from edgetrain.store.tensors import Spilled
from edgetrain.stream.cell import Cell
from edgetrain.stream.state import CellState


class Shelf(Protocol):
    """Stores cells that do not fit into the host tier (``store.units.UnitFiles``)."""

    def spill(self, unit: str, kinds: Mapping[str, Mapping[str, torch.Tensor]]) -> Spilled:
        """Put a cell on disk for a while."""
        ...

    def unspill(self, spilled: Spilled, optimizer: bool = True) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Read it, or its weights alone."""
        ...

    def discard(self, spilled: Spilled) -> None:
        """Remove it, if it is still there."""
        ...


@dataclass
class _Held:
    """Where a cell is while it is away: in the host tier, spilled, or in a checkpoint."""

    host: CellState | None = None
    spilled: Spilled | None = None
    saved: Callable[[bool], CellState] | None = None
    dirty: bool = True  # changed since the newest checkpoint


class CellStream:
    """Gives one cell at a time a place on the device.

    Args:
        place: makes a cell on the device from its state (``None``: its first weights).
        device: where that is.
        meter: watches the device side.
        shelf: stores cells that do not fit into the host tier.
        host_bytes: size of the host tier.
        keep: leave cells on the device when the next one comes.
        trims: give memory that a cell has left back to the system, rather than to the next cell.
    """

    def __init__(
        self,
        place: Callable[[int, CellState | None], Cell],
        device: torch.device,
        meter: Meter,
        shelf: Shelf,
        host_bytes: int,
        keep: bool,
        trims: bool = True,
    ):
        self._place, self._device, self._meter = place, device, meter
        self._shelf, self._host_bytes, self._keep, self._trims = shelf, host_bytes, keep, trims
        self._held: dict[int, _Held] = {}
        self._live: dict[int, Cell] = {}
        self._current: int | None = None
        self._changes = self._learns = False  # whether the current visit trains, and whether its optimizer is there
        self._host_used = 0
        self._reader = ThreadPoolExecutor(1, "edgetrain-cells")
        self._coming: tuple[int, bool, Future[CellState]] | None = None

    def visit(self, index: int, changes: bool = True) -> Cell:
        """The cell, on the device; the one before it leaves unless cells are kept there.

        Args:
            index: of the cell.
            changes: whether it is trained; of a cell that is not, the copy at rest stays valid, and its optimizer
                stays there.
        """
        held = self._held.get(index)
        if self._current != index or (changes and not self._learns):
            self.leave()
            self._meter.start_cell(index)
            self._learns = changes or self._keep
            if index not in self._live:
                with self._meter.watch():
                    self._live[index] = self._place(index, None if held is None else self._fetch(index, held))
            self._current = index
        if changes:
            self._changes = True
            self._held.setdefault(index, _Held()).dirty = True
        return self._live[index]

    def leave(self) -> None:
        """Take the current cell off the device, unless cells are kept there."""
        index, self._current = self._current, None
        changed, self._changes = self._changes, False
        if index is None or self._keep:
            return
        cell = self._live.pop(index)
        if changed:
            self._shelve(index, cell.state_dict(self._held[index].host))
        del cell
        if self._trims:
            give_back_free_memory()

    def weights(self, index: int) -> CellState:
        """A cell's weights, of a cell that is not on the device; host tensors that must not be changed."""
        held = self._held[index]
        return self._read(held, optimizer=False) if held.host is None else held.host.without_optimizer()

    def expect(self, index: int, changes: bool = True) -> None:
        """Start to read a cell that will be visited next, if it is on disk; see ``visit``."""
        held = self._held.get(index)
        on_disk = held is not None and held.host is None and index not in self._live
        if on_disk and held is not None and (self._coming is None or self._coming[:2] != (index, changes)):
            self._coming = (index, changes, self._reader.submit(self._read, held, changes))

    def dirty(self) -> list[int]:
        """Cells that changed since the newest checkpoint."""
        return sorted(index for index, held in self._held.items() if held.dirty)

    def content(self, index: int) -> CellState | Spilled:
        """What to save of a cell: host tensors, or its files if it was spilled; it stays where it is."""
        if index in self._live and (self._learns or index != self._current):
            return self._live[index].state_dict()
        held = self._held[index]
        if self._coming is not None and self._coming[0] == index:
            wait([self._coming[2]])  # its files are about to be moved
        found = held.host if held.host is not None else held.spilled
        assert found is not None, "a dirty cell is on the device, in the host tier, or spilled"
        return found

    def saved(self, index: int, read: Callable[[bool], CellState], needed: bool) -> None:
        """A cell is safe on disk, where ``read`` finds it; one no longer needed leaves the host tier.

        ``read`` is asked whether with the optimizer state.
        """
        held = self._held.setdefault(index, _Held())
        if held.spilled is not None:
            self._shelf.discard(held.spilled)  # unless it was moved into the checkpoint
        held.spilled, held.saved, held.dirty = None, read, False
        if not needed:
            self._drop_host(held)

    def changes_on(self) -> None:
        """The current cell is trained further after a checkpoint."""
        if self._current is not None and self._changes:
            self._held[self._current].dirty = True

    def close(self) -> None:
        """Drop everything."""
        self._reader.shutdown(cancel_futures=True)
        for held in self._held.values():
            if held.spilled is not None:
                self._shelf.discard(held.spilled)
        self._live.clear()
        self._held.clear()

    def _drop_host(self, held: _Held) -> None:
        if held.host is not None:
            self._host_used -= held.host.size
            held.host = None

    def _fetch(self, index: int, held: _Held) -> CellState:
        if held.host is not None:
            return held.host if self._learns else held.host.without_optimizer()
        if self._coming is not None and self._coming[0] == index:
            (_, learns, future), self._coming = self._coming, None
            if learns == self._learns:
                return future.result()
            wait([future])
        return self._read(held, self._learns)

    def _read(self, held: _Held, optimizer: bool) -> CellState:
        if held.spilled is not None:
            state = CellState.of_kinds(self._shelf.unspill(held.spilled, optimizer))
        else:
            assert held.saved is not None
            state = held.saved(optimizer)
        return state.map(self._staged) if queues.copies_async(self._device) else state

    def _staged(self, value: torch.Tensor) -> torch.Tensor:
        return queues.staging(tuple(value.shape), value.dtype, self._device).copy_(value)

    def _shelve(self, index: int, state: CellState) -> None:
        held, size = self._held[index], state.size
        self._drop_host(held)  # it is what now holds the state, or a part of it
        if self._host_used + size <= self._host_bytes:
            held.host = state
            self._host_used += size
            if held.spilled is not None:
                self._shelf.discard(held.spilled)
                held.spilled = None
            return
        if held.dirty:  # otherwise the checkpoint has it
            held.spilled = self._shelf.spill(f"{index:03}", state.to_kinds())
