"""A cell too wide for the device stays on the host and comes to the device in tiles of its units.

A local objective sees a wide cell only through a statistic that is a sum over its units, so a step can be
done exactly in two sweeps over the tiles, with D between them (Mono-Forward: S are the logits):

    1. S = sum over tiles T of s_T(x; W_T, P_T)          nothing is kept but S and, if wanted, latents
    2. D = dL/dS                                          and the step of what belongs to no unit
    3. for each T: the gradient of <s_T, D>, and the tile's own optimizer step

All gradients of a tile come from its old weights, and S from everybody's: it is the untiled step. Only the
order of summation differs. Optimizers work element by element, so tiles may have one each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from edgetrain.memory.timeline import making
from edgetrain.objectives.base import Batch, Node, Objective, Streams
from edgetrain.stream.cell import Host, LiveCell, Modules, OptimizerRecipe, State, copied, first_state, unstored
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.feed import Part, Slice
from edgetrain.stream.latents import Sink

TILE_MULTIPLE = 16  # units; fused optimizers give other last bits to tiles of other sizes
_HOST = torch.device("cpu")


def cuts(units: int, tiles: int) -> list[slice]:
    """At most ``tiles`` runs of units, each but the last a multiple of ``TILE_MULTIPLE`` long."""
    size = -(-units // tiles)
    size = -(-size // TILE_MULTIPLE) * TILE_MULTIPLE
    return [slice(first, min(first + size, units)) for first in range(0, units, size)]


def phases_of(objective: Objective, tiles: int) -> int:
    """Passes over a training batch: the objective's phases, or two sweeps over the tiles and D between them."""
    return len(objective.phases) if tiles == 1 else 2 * tiles + 1


class TiledCell:
    """One cell whose values are on the host.

    Args:
        node: which cell.
        objective: the rule, which must be able to be tiled.
        optimizer: of each tile.
        device: where tiles go.
        tiles: how many are asked for.
        state: named host tensors to start from; ``None``: first weights, drawn from the cell's key.
        host: the meter's scope for host tensors.
        shapes: cell and head on the meta device, to be given room but no values (a dry run).
    """

    def __init__(
        self,
        node: Node,
        objective: Objective,
        optimizer: OptimizerRecipe,
        device: torch.device,
        tiles: int,
        state: Mapping[str, Tensor] | None = None,
        host: Host = nullcontext,
        shapes: Modules | None = None,
    ):
        assert node.recipe is not None
        self.node, self.device, self.units = node, device, cuts(prod(node.shape), tiles)
        self._objective, self._optimizer, self._host = objective, optimizer, host
        self._bare = shapes is not None
        if self._bare and len(self.units) > 3:  # full tiles are all alike: two of them and the last tell the peak
            self.units = [*self.units[:2], self.units[-1]]
        with host():
            self._state = dict(state) if state is not None else first_state(node, objective, shapes)
        self._axes = {f"head.{name}": axis for name, axis in (objective.tile_axes or {}).items()}
        self._steps: dict[str, Tensor] = {}  # the optimizer's counts, which all tiles of a step share
        self._stepped = any(name.startswith("optim.") for name in self._state)
        self.common = self._common()

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.units)

    def tile(self, number: int) -> LiveCell:
        """A tile on the device, with its optimizer."""
        units = self.units[number]
        node = self._node(units)
        assert node.recipe is not None
        modules = node.recipe.build, partial(self._objective.tile_head, self.node, node, units)
        own = {
            name: self._cut(name, value, units)
            for name, value in self._state.items()
            if self._is_cut(name) and (self._stepped or not name.startswith("optim."))
        }
        return LiveCell(node, self._objective, self._optimizer, self.device, own, self._host, self._made(*modules))

    def keep(self, number: int, tile: LiveCell) -> None:
        """Take back a tile that made its step."""
        units, last = self.units[number], number == len(self.units) - 1
        for name, value in tile.state().items():
            if value.ndim == 0 and name.startswith("optim."):  # counts: the tiles to come need the old ones
                with self._host():
                    self._steps[name] = value.to(_HOST, copy=True)
                continue
            with self._host():
                whole = self._state.get(name)
                if whole is None:
                    whole = self._state[name] = self._room(name, value)
                self._cut(name, whole, units).copy_(value)
        if last:
            self._state.update(self._steps)
            self._stepped = True

    def settle(self) -> None:
        """Take back what belongs to no unit, after its step."""
        if self.common is not None:
            for name, value in self.common.state().items():
                self._state[name] = copied_to_host(value, self._host)

    def state(self) -> State:
        """Everything that the cell will need on its next visit, as host tensors."""
        return dict(self._state)

    def rows(self, count: int, names: Iterator[str] | list[str]) -> dict[str, Tensor]:
        """Host room for latents of the whole cell, float32 [count, n] for each stream."""
        with self._host():
            return {name: torch.empty(count, prod(self.node.shape)) for name in names}

    def put(self, rows: Mapping[str, Tensor], part: Part, units: slice, latents: Streams) -> None:
        """A tile's latents into their columns."""
        with self._host():
            for name, values in latents.items():
                rows[name][part.first : part.last, units].copy_(values)

    def _node(self, units: slice) -> Node:
        assert self.node.recipe is not None
        assert self.node.recipe.narrower is not None
        width = units.stop - units.start
        return replace(self.node, recipe=self.node.recipe.narrower(width), shape=(width,))

    def _common(self) -> LiveCell | None:
        """What of the head belongs to no unit, on the device."""
        modules = self._made(nn.Module, partial(self._objective.common_head, self.node))
        if modules[1] is None:
            return None
        own = {name: value for name, value in self._state.items() if not self._is_cut(name)}
        return LiveCell(self.node, self._objective, self._optimizer, self.device, own, self._host, modules)

    def _made(self, module: Callable[[], nn.Module], head: Callable[[], nn.Module | None]) -> Modules:
        """Modules without values, which come from the state; fixed matrices of the head are made for real."""
        with unset_fake_temporarily(), torch.device("meta"):
            bare = module(), head()
        if self._bare or not unstored(bare):
            return bare
        with self._host():
            return bare[0], head()

    def _plain(self, name: str) -> str:
        """The name of the learned tensor that a tensor of the state belongs to."""
        return name.split(".", 2)[2].rpartition(".")[0] if name.startswith("optim.") else name

    def _is_cut(self, name: str) -> bool:
        plain = self._plain(name)
        return plain.startswith("cell.") or plain in self._axes

    def _cut(self, name: str, value: Tensor, units: slice) -> Tensor:
        """The units' part of a tensor of the whole cell."""
        if value.ndim == 0:
            return value
        axis = self._axes.get(self._plain(name), 0)
        return value.narrow(axis, units.start, units.stop - units.start)

    def _room(self, name: str, part: Tensor) -> Tensor:
        """A whole tensor of the optimizer, made when the first tile brings its part."""
        shape = list(part.shape)
        shape[self._axes.get(self._plain(name), 0)] = prod(self.node.shape)
        return torch.zeros(shape, dtype=part.dtype)


def copied_to_host(value: Tensor, host: Host) -> Tensor:
    """A copy among host tensors."""
    with host():
        return copied(value, _HOST)


class Sweeps:
    """Carries out steps of a tiled cell.

    Args:
        objective: the rule.
        inputs: makes what the cell reads of a part.
    """

    def __init__(self, objective: Objective, inputs: Callable[[Part], Streams]):
        self._objective, self._inputs = objective, inputs

    def train(
        self,
        cell: TiledCell,
        parts: Iterator[Part],
        work: Slice,
        size: int,
        draws: StepDraws,
        add: Callable[[Part, Tensor, Tensor | None], None],
        sink: Sink | None,
    ) -> None:
        """One step of ``size`` samples; ``add`` is told of each part's loss and scores."""
        pieces = pieces_of(work, size)
        statistic = self._gather(cell, parts, pieces, size, sink)
        slope = self._slope(cell, parts, pieces, draws, statistic, add)
        for number in range(len(cell.units)):
            tile = cell.tile(number)
            _, learned, optimizer = tile.phases[0]
            for _ in range(pieces):
                part = next(parts)
                with making("activations"):
                    found, _ = self._objective.statistic(cell.node, tile.module, tile.head, self._learned(part))
                weight = slope[part.first : part.last]
                with making("gradients"):
                    (found * weight).sum().backward(inputs=learned)  # type: ignore[no-untyped-call]
                part.streams = {}
                del found
            with making("optimizer state"):
                optimizer.step()
            cell.keep(number, tile)
            del tile, learned, optimizer

    def _gather(self, cell: TiledCell, parts: Iterator[Part], pieces: int, size: int, sink: Sink | None) -> Tensor:
        """The first sweep: the statistic [size, m] and, into ``sink``, latents from before the update."""
        total: Tensor | None = None
        rows: dict[str, Tensor] = {}
        start = 0
        with torch.no_grad():
            for number, units in enumerate(cell.units):
                tile = cell.tile(number)
                for _ in range(pieces):
                    part = next(parts)
                    with making("activations"):
                        found, latents = self._objective.statistic(
                            cell.node, tile.module, tile.head, self._inputs(part)
                        )
                        if total is None:
                            total = found.new_zeros(size, found.shape[1])
                    total[part.first : part.last] += found
                    if sink is not None:
                        rows = rows or cell.rows(size, list(latents))
                        cell.put(rows, part, units, latents)
                    part.streams, start = {}, part.start
                    del found, latents
                del tile
        if sink is not None:
            sink.put(start, rows)
        assert total is not None
        return total

    def _slope(
        self,
        cell: TiledCell,
        parts: Iterator[Part],
        pieces: int,
        draws: StepDraws,
        statistic: Tensor,
        add: Callable[[Part, Tensor, Tensor | None], None],
    ) -> Tensor:
        """D = dL/dS [size, m] of the mean loss, and the step of what belongs to no unit."""
        with making("gradients"):
            slope = torch.empty_like(statistic)
        common = cell.common
        learned = [] if common is None else common.phases[0][1]
        for _ in range(pieces):
            part = next(parts)
            draws.first = part.first
            leaf = statistic[part.first : part.last].detach().requires_grad_()
            with making("latents"):
                batch = Batch(self._inputs(part), part.y, draws)
            with making("activations"):
                step = self._objective.tiled_loss(cell.node, leaf, None if common is None else common.head, batch)
            add(part, step.loss, step.scores)
            with making("gradients"):
                (step.loss / part.size).backward(inputs=[leaf, *learned])  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            slope[part.first : part.last] = leaf.grad
            part.streams = {}
            del batch, leaf, step
        if common is not None and learned:
            with making("optimizer state"):
                common.phases[0][2].step()
            for value in learned:
                value.grad = None
            cell.settle()
        return slope

    def emit(self, cell: TiledCell, parts: Iterator[Part], work: Slice, size: int) -> tuple[int, dict[str, Tensor]]:
        """Latents of one batch of the finished cell, on the host, and the batch's first row."""
        rows: dict[str, Tensor] = {}
        start = 0
        for number, units in enumerate(cell.units):
            tile = cell.tile(number)
            for _ in range(pieces_of(work, size)):
                part = next(parts)
                with making("latents"):
                    latents = self._objective.latent(tile.module, self._inputs(part))
                rows = rows or cell.rows(size, list(latents))
                cell.put(rows, part, units, latents)
                part.streams, start = {}, part.start
                del latents
            del tile
        return start, rows

    def read(self, cell: TiledCell, parts: Iterator[Part], size: int) -> tuple[Part, Tensor | None, dict[str, Tensor]]:
        """One whole batch, its scores [size, C] on the device, and its latents on the host."""
        total: Tensor | None = None
        rows: dict[str, Tensor] = {}
        for number, units in enumerate(cell.units):
            tile, part = cell.tile(number), next(parts)
            with making("latents"):
                found, latents = self._objective.statistic(cell.node, tile.module, tile.head, self._inputs(part))
            total = found if total is None else total.add_(found)
            rows = rows or cell.rows(size, list(latents))
            cell.put(rows, part, units, latents)
            part.streams = {}
            del tile, found, latents
        assert total is not None
        return part, self._objective.tiled_score(cell.node, total), rows

    def _learned(self, part: Part) -> Streams:
        """The streams that the loss depends on."""
        return {name: values for name, values in self._inputs(part).items() if name in self._objective.learned_streams}


def at_hand(
    node: Node,
    objective: Objective,
    optimizer: OptimizerRecipe,
    device: torch.device,
    tiles: int,
    state: Mapping[str, Tensor] | None = None,
    host: Host = nullcontext,
    shapes: Modules | None = None,
) -> LiveCell | TiledCell:
    """A cell ready for its visit: on the device, or tiled if more than one tile is asked for."""
    if tiles == 1:
        return LiveCell(node, objective, optimizer, device, state, host, shapes)
    return TiledCell(node, objective, optimizer, device, tiles, state, host, shapes)


def pieces_of(work: Slice, size: int) -> int:
    """Micro-batches of a batch."""
    return sum(1 for _ in work.parts(size)) // work.phases
