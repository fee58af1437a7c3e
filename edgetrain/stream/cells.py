"""Cells between their visits: on the device, in the host tier, or on disk.

A cell that leaves the device goes to the host tier while that has room. When it has none the cell
that just left goes to disk, not an older one: visits go round, so it is the one needed last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from edgetrain.memory.meter import Meter
from edgetrain.store.atomic import storage_errors
from edgetrain.store.tensors import read_tensors
from edgetrain.stream.cell import LiveCell, State, copied

_HOST = torch.device("cpu")


class Ledger(Protocol):
    """Counts what a run takes on disk."""

    def space(self, size: int) -> None:
        """Bytes allocated; negative: freed."""
        ...

    def wrote(self, size: int) -> None:
        """Bytes written."""
        ...


@dataclass
class _Held:
    """Where a cell is while it is away: host tensors, or how to read them; ``dirty``: not committed."""

    host: State | None = None
    read: Callable[[], State] | None = None
    dirty: bool = True


class CellStream:
    """Gives one cell at a time a place on the device.

    Args:
        place: makes a cell on the device from its state (``None``: its first weights).
        device: where that is.
        meter: watches the device side.
        scratch: folder for cells that the host tier has no room for.
        host_bytes: size of the host tier.
        keep: leave cells on the device when the next one comes.
        ledger: counts space and writes.
    """

    def __init__(
        self,
        place: Callable[[int, Mapping[str, torch.Tensor] | None], LiveCell],
        device: torch.device,
        meter: Meter,
        scratch: Path,
        host_bytes: int,
        keep: bool,
        ledger: Ledger,
    ):
        self._place, self._device, self._meter = place, device, meter
        self._scratch, self._host_bytes, self._keep, self._ledger = scratch, host_bytes, keep, ledger
        self._held: dict[int, _Held] = {}
        self._live: dict[int, LiveCell] = {}
        self._current: int | None = None
        self._host_used = 0
        self._reader = ThreadPoolExecutor(1, "edgetrain-cells")
        self._coming: tuple[int, Future[State]] | None = None

    def visit(self, index: int) -> LiveCell:
        """The cell, on the device; the one before it leaves unless cells are kept there."""
        if self._current != index:
            self.leave()
            if index not in self._live:
                self._meter.start_cell()
                with self._meter.watch():
                    self._live[index] = self._place(index, self._fetch(index))
            self._current = index
        self._held.setdefault(index, _Held()).dirty = True
        return self._live[index]

    def leave(self) -> None:
        """Take the current cell off the device, unless cells are kept there."""
        index, self._current = self._current, None
        if index is None or self._keep:
            return
        state = self._to_host(self._live.pop(index))
        self._shelve(index, state)

    def expect(self, index: int) -> None:
        """Start to read a cell that will be visited next, if it is on disk."""
        held = self._held.get(index)
        if held is None or held.host is not None or held.read is None or index in self._live:
            return
        if self._coming is None or self._coming[0] != index:
            self._coming = (index, self._reader.submit(self._read, held.read))

    def dirty(self) -> list[int]:
        """Cells that changed since they were committed."""
        return sorted(index for index, held in self._held.items() if held.dirty)

    def state(self, index: int) -> State:
        """A cell's state as host tensors, wherever it is; on the device it stays there."""
        if index in self._live:
            return self._to_host(self._live[index])
        held = self._held[index]
        if held.host is not None:
            return held.host
        assert held.read is not None
        return held.read()

    def committed(self, index: int, read: Callable[[], State], needed: bool) -> None:
        """A cell is safe on disk, where ``read`` finds it; one no longer needed leaves the host tier."""
        held = self._held.setdefault(index, _Held())
        self._drop_scratch(index)
        held.read, held.dirty = read, False
        if not needed and held.host is not None:
            self._host_used -= _size(held.host)
            held.host = None

    def close(self) -> None:
        """Drop everything."""
        self._reader.shutdown(cancel_futures=True)
        for index in self._held:
            self._drop_scratch(index)
        self._live.clear()
        self._held.clear()

    def _fetch(self, index: int) -> State | None:
        held = self._held.get(index)
        if held is None:
            return None
        if held.host is not None:
            state, held.host = held.host, None
            self._host_used -= _size(state)
            return state
        if self._coming is not None and self._coming[0] == index:
            future, self._coming = self._coming[1], None
            return future.result()
        return None if held.read is None else self._read(held.read)

    def _read(self, read: Callable[[], State]) -> State:
        state = read()
        if self._device.type == "cuda":
            return {name: value.pin_memory() for name, value in state.items()}
        return state

    def _shelve(self, index: int, state: State) -> None:
        held, size = self._held[index], _size(state)
        if self._host_used + size <= self._host_bytes:
            held.host = state
            self._host_used += size
            return
        path = self._path(index)
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
            self._drop_scratch(index)
            save_file(state, path)
        self._ledger.space(size)
        self._ledger.wrote(size)
        held.read = lambda: read_tensors(path)

    def _drop_scratch(self, index: int) -> None:
        path = self._path(index)
        if path.exists():
            self._ledger.space(-path.stat().st_size)
            path.unlink()

    def _path(self, index: int) -> Path:
        return self._scratch / f"{index:03}.safetensors"

    def _to_host(self, cell: LiveCell) -> State:
        with self._meter.host():
            return {name: copied(value, _HOST) for name, value in cell.state().items()}


def _size(state: Mapping[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
