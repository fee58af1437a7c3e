"""A cell that is trained in tiles: the exact step in two sweeps over them.

A local objective sees a wide cell only through a statistic that is a sum over its units, so that a step can be
done with one tile on the device at a time (Mono-Forward: S are the logits):

    1. S = sum over tiles T of s_T(x_T; W_T)     nothing is kept but S and, if wanted, latents
    2. D = dL/dS
    3. for each T: the gradient of <s_T, D>, and the tile's own optimizer step

All gradients of a tile are from its old weights, and S from everybody's: it is the step without tiles. Only the
order of summation differs. Optimizers work element by element, so that every tile has one of its own. What belongs
to no unit but is learned (a bias) is part of the first tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from edgetrain.memory.timeline import making
from edgetrain.objectives.base import Streams
from edgetrain.objectives.statistic import StatisticObjective
from edgetrain.stream.cell import ResidentCell
from edgetrain.stream.outputs import Outputs
from edgetrain.stream.reader import Batch, MicroBatch
from edgetrain.stream.state import Host


class Tiled(ABC):
    """What cells in tiles have in common; implements ``stream.cell.Cell``.

    Attributes:
        index: its number among the nodes of the schedule.
        objective: the rule.
        host: the meter's scope for host tensors.
        sources: number of the source that each tile reads.
        loss_source: number of the source that the loss reads once S is known.
        units: of the whole cell.
    """

    index: int
    sources: Sequence[int]
    loss_source: int
    units: int
    objective: StatisticObjective
    host: Host

    @abstractmethod
    def tile(self, number: int) -> ResidentCell:
        """A tile on the device, with its optimizer."""

    @abstractmethod
    def keep(self, number: int, tile: ResidentCell) -> None:
        """Take back a tile that made its step."""

    def fixed(self) -> object:
        """What of the head the loss needs once S is known, on the device."""
        return None

    def latent_rows(self, count: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Host room for latents of the whole cell, [count, n] for each stream."""
        raise NotImplementedError

    def put(self, rows: Mapping[str, Tensor], micro: MicroBatch, number: int, latents: Streams) -> None:
        """Put a tile's latents into their columns."""
        raise NotImplementedError

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.sources)

    @property
    def reads(self) -> Sequence[int]:
        """See ``Cell``."""
        return self.sources

    @property
    def train_reads(self) -> Sequence[int]:
        """See ``Cell``."""
        return (*self.sources, self.loss_source, *self.sources)

    def set_training(self, training: bool) -> None:  # noqa: B027 (see below)
        """Tiles have no modes: what draws or has statistics of the batch cannot be cut into tiles."""

    def learned(self) -> Iterator[Tensor]:
        """See ``Cell``: none is on the device as a whole."""
        return iter(())

    def train_step(self, batch: Batch, out: Outputs) -> None:
        """See ``Cell``."""
        with torch.no_grad():
            statistic, rows = self._first_sweep(batch, out.takes_latents)
        if out.takes_latents:
            self._put_out(batch, rows, out)
        slope = self._slope(batch, statistic, out)
        del statistic
        for number in range(self.tiles):
            self._learn(batch, number, slope)

    def emit(self, batch: Batch, out: Outputs) -> None:
        """See ``Cell``."""
        rows: dict[str, Tensor] = {}
        for number, source in enumerate(self.sources):
            tile = self.tile(number)
            for micro in batch.micro_batches(source):
                with making("latents"):
                    latents = self.objective.latent(tile.module, micro.read().streams)
                rows = rows or self.latent_rows(batch.size, list(latents))
                self.put(rows, micro, number, latents)
                del latents
            del tile
        self._put_out(batch, rows, out)

    def evaluate(self, batch: Batch, out: Outputs) -> None:
        """See ``Cell``; latents are given on the host."""
        statistic, rows = self._first_sweep(batch, keeps_latents=True)
        self._put_out(batch, rows, out)
        out.scores(batch.start, self.objective.scores_from(statistic), rows)

    def _put_out(self, batch: Batch, rows: Streams, out: Outputs) -> None:
        with self.host():
            out.latents(batch.start, rows)

    def _first_sweep(self, batch: Batch, keeps_latents: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """S [size, m] and, if wanted, latents on the host."""
        total: Tensor | None = None
        rows: dict[str, Tensor] = {}
        for number, source in enumerate(self.sources):
            tile = self.tile(number)
            for micro in batch.micro_batches(source):
                with making("activations"):
                    found, latents = self._statistic(tile, micro.read().streams)
                    if total is None:
                        total = found.new_zeros(batch.size, found.shape[1])
                total[micro.first : micro.last] += found
                if keeps_latents:
                    rows = rows or self.latent_rows(batch.size, list(latents))
                    self.put(rows, micro, number, latents)
                del found, latents
            del tile
        assert total is not None
        return total, rows

    def _slope(self, batch: Batch, statistic: Tensor, out: Outputs) -> Tensor:
        """D = dL/dS [size, m] of the mean loss."""
        with making("gradients"):
            slope = torch.empty_like(statistic)
        for micro in batch.micro_batches(self.loss_source):
            leaf = statistic[micro.first : micro.last].requires_grad_()
            shown = micro.read()
            with making("activations"):  # a loss may change what it is given in place, but not a leaf
                step = self.objective.loss_from(leaf.clone(), self.fixed(), shown)
            out.loss(batch.step, step.loss, step.scores, shown.y)
            with making("gradients"):
                (step.loss / batch.size).backward(inputs=[leaf])  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            slope[micro.first : micro.last] = leaf.grad
            del leaf, shown, step
        return slope

    def _learn(self, batch: Batch, number: int, slope: Tensor) -> None:
        """The second sweep over one tile, and its step."""
        tile = self.tile(number)
        _, learned, optimizer = tile.phases[0]
        for micro in batch.micro_batches(self.sources[number]):
            with making("activations"):
                found, _ = self._statistic(tile, self._learned_streams(micro))
            weight = slope[micro.first : micro.last]
            with making("gradients"):
                (found * weight).sum().backward(inputs=learned)  # type: ignore[no-untyped-call]
            del found
        tile.update(learned, optimizer, batch.number)
        self.keep(number, tile)

    def _statistic(self, tile: ResidentCell, streams: Streams) -> tuple[Tensor, Streams]:
        return self.objective.statistic(tile.module, tile.head, streams, self.units)

    def _learned_streams(self, micro: MicroBatch) -> Streams:
        """The streams that the loss depends on."""
        streams = micro.read().streams
        return {name: values for name, values in streams.items() if name in self.objective.learned_streams}
