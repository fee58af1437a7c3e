"""A cell too wide for the device: its values are on the host, and its units come to the device in tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from edgetrain.memory.timeline import making
from edgetrain.objectives.base import Node, Streams
from edgetrain.objectives.statistic import StatisticObjective
from edgetrain.stream.cell import Cell, Modules, ResidentCell, Setup, first_state, placed, unstored
from edgetrain.stream.reader import MicroBatch
from edgetrain.stream.state import CellState, Slot
from edgetrain.stream.sweeps import Tiled

TILE_MULTIPLE = 16  # units; fused optimizers give other last bits to tiles of other sizes
_HOST = torch.device("cpu")


def ranges_of(units: int, tiles: int) -> list[slice]:
    """At most ``tiles`` ranges of units, each but the last a multiple of ``TILE_MULTIPLE`` long."""
    size = -(-units // tiles)
    size = -(-size // TILE_MULTIPLE) * TILE_MULTIPLE
    return [slice(first, min(first + size, units)) for first in range(0, units, size)]


class TiledCell(Tiled):
    """One cell whose values are on the host.

    Args:
        node: which cell.
        setup: what its tiles are built with; the objective must be a ``StatisticObjective``.
        tiles: how many are asked for.
        state: host tensors to start from; ``None``: first weights, drawn from the cell's key.
        shapes: cell and head on the meta device, to be given room but no values (a dry run).
    """

    loss_source = 0

    def __init__(
        self, node: Node, setup: Setup, tiles: int, state: CellState | None = None, shapes: Modules | None = None
    ):
        self.node, self.index, self._setup = node, node.index, setup
        self.objective = cast(StatisticObjective, setup.objective)
        self.host, self.units = setup.host, prod(node.shape)
        self.ranges = ranges_of(self.units, tiles)
        self._without_values = shapes is not None
        if self._without_values and len(self.ranges) > 3:  # full tiles are alike: two and the last tell the peak
            self.ranges = [*self.ranges[:2], self.ranges[-1]]
        self.sources: Sequence[int] = (0,) * len(self.ranges)
        with setup.host():
            self._state = state or first_state(node, setup.objective, shapes)
        self._counts: dict[Slot, Tensor] = {}  # of steps, which all tiles of a step read before one is set
        self._has_stepped = bool(self._state.optimizer)
        self._fixed = self._fixed_head()

    def tile(self, number: int) -> ResidentCell:
        """See ``Tiled``."""
        units, node = self.ranges[number], self._node(self.ranges[number])
        first = number == 0

        def head() -> nn.Module | None:
            return self.objective.tile_head(self.node, node, units)

        return ResidentCell(node, self._setup, self._part(units, first), self._made(node.recipe.build, head))

    def keep(self, number: int, tile: ResidentCell) -> None:
        """See ``Tiled``."""
        units, state = self.ranges[number], tile.state()
        with self._setup.host():
            for name, value in state.module.items():
                _cut(self._state.module[name], 0, units).copy_(value)
            for name, value in state.head.items():
                _cut(self._state.head[name], self._axis(f"head.{name}"), units).copy_(value)
            for slot, value in state.optimizer.items():
                self._keep_optimizer(slot, value, units)
        if number == len(self.ranges) - 1:
            self._state.optimizer.update(self._counts)
            self._has_stepped = True

    def fixed(self) -> nn.Module | None:
        """See ``Tiled``."""
        return self._fixed

    def state_dict(self, room: CellState | None = None) -> CellState:
        """See ``Cell``."""
        return self._state.map(lambda value: value)

    def latent_rows(self, count: int, names: Sequence[str]) -> dict[str, Tensor]:
        """See ``Tiled``."""
        with self._setup.host():
            return {name: torch.empty(count, self.units) for name in names}

    def put(self, rows: Mapping[str, Tensor], micro: MicroBatch, number: int, latents: Streams) -> None:
        """See ``Tiled``."""
        with self._setup.host():
            for name, values in latents.items():
                rows[name][micro.first : micro.last, self.ranges[number]].copy_(values)

    def _keep_optimizer(self, slot: Slot, value: Tensor, units: slice) -> None:
        if value.ndim == 0:
            self._counts[slot] = value.to(_HOST, copy=True)
            return
        axis = self._axis(slot[1])
        whole = self._state.optimizer.get(slot)
        if whole is None:  # made when the first tile brings its part
            shape = list(value.shape)
            if axis is not None:
                shape[axis] = self.units
            whole = self._state.optimizer[slot] = torch.zeros(shape, dtype=value.dtype)
        _cut(whole, axis, units).copy_(value)

    def _part(self, units: slice, first: bool) -> CellState:
        """The state of a tile; the first one has the tensors that are not split across units."""
        state = self._state
        head = {name: self._axis(f"head.{name}") for name in state.head}
        optimizer = {slot: self._axis(slot[1]) for slot in state.optimizer} if self._has_stepped else {}
        return CellState(
            {name: _cut(value, 0, units) for name, value in state.module.items()},
            {name: _cut(state.head[name], axis, units) for name, axis in head.items() if first or axis is not None},
            {
                slot: _cut(state.optimizer[slot], axis, units)
                for slot, axis in optimizer.items()
                if first or axis is not None
            },
        )

    def _axis(self, owner: str) -> int | None:
        """The axis of the units of a learned tensor (``cell.*`` or ``head.*``); ``None``: it is not split."""
        kind, _, name = owner.partition(".")
        return 0 if kind == "cell" else (self.objective.tile_axes or {}).get(name)

    def _node(self, units: slice) -> Node:
        width = units.stop - units.start
        assert self.node.recipe.narrower is not None
        return replace(self.node, recipe=self.node.recipe.narrower(width), shape=(width,))

    def _fixed_head(self) -> nn.Module | None:
        """See ``StatisticObjective.fixed_head``, on the device."""
        _, head = self._made(nn.Module, lambda: self.objective.fixed_head(self.node))
        if head is None:
            return None
        with making("weights"):
            return placed(head, None, self._setup.device)

    def _made(self, module: Callable[[], nn.Module], head: Callable[[], nn.Module | None]) -> Modules:
        """Modules without values, which come from the state; fixed matrices of the head are made with theirs."""
        with unset_fake_temporarily(), torch.device("meta"):
            made = module(), head()
        if self._without_values or not unstored(made):
            return made
        with self._setup.host():
            return made[0], head()


def build_cell(
    node: Node, setup: Setup, tiles: int = 1, state: CellState | None = None, shapes: Modules | None = None
) -> Cell:
    """A cell ready for its visit: on the device, or in tiles if more than one is asked for."""
    if tiles == 1:
        return ResidentCell(node, setup, state, shapes)
    return TiledCell(node, setup, tiles, state, shapes)


def _cut(whole: Tensor, axis: int | None, units: slice) -> Tensor:
    """The part of a cell's tensor for some of its units; all of it if it is not split across units."""
    if axis is None or whole.ndim == 0:
        return whole
    return whole.narrow(axis, units.start, units.stop - units.start)
