"""Backpropagation that streams its layers: the weights are bit for bit those of backpropagation with checkpointing.

A step goes forward through the layers and back, with one layer on the device at a time::

    for i in 0 .. L-2:   load the weights of layer i; z_i = f_i(z_{i-1}) without a graph; z_i waits on the host
    for i in L-1 .. 0:   load layer i with its optimizer; compute f_i(z_{i-1}) again, with its graph; from the gradient
                         of z_i (of the loss, for the last layer) the gradients of weights and of z_{i-1}; step; store

The gradient of z_i takes the place of z_i on the host. Each layer is done for the whole batch, micro-batch by
micro-batch, so that its weights travel once in each direction: with float32 weights and Adam 28 bytes per parameter and
step. What makes it exact: random draws of layers are keyed by layer and micro-batch; batch normalisation updates its
running statistics only on the way back; what waits on the host keeps its order in memory.

Bharadwaj Pudipeddi et al.: Training Large Neural Networks with Constant Memory using a New Execution Algorithm, 2020,
https://arxiv.org/abs/2002.05645 (L2L).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgetrain.memory.timeline import making
from edgetrain.nets.memory_format import dense_format, to_channels_last
from edgetrain.nets.settled import settled
from edgetrain.objectives.base import Batch as Shown
from edgetrain.store.scratch import mapped
from edgetrain.stream.cell import ResidentCell, copied
from edgetrain.stream.cells import CellStream
from edgetrain.stream.outputs import Outputs
from edgetrain.stream.reader import LABELS_ONLY, Batch
from edgetrain.stream.state import Host


class Between:
    """What waits on the host between the layers of a step: each layer's outputs, on the way back their gradients.

    Args:
        rows: of the largest batch.
        host: the meter's scope for host tensors.
        folder: where to put files that hold it; ``None``: it is in memory.
    """

    def __init__(self, rows: int, host: Host, folder: Path | None = None):
        self._rows, self._host, self._folder = rows, host, folder
        self._held: dict[int, Tensor] = {}

    def put(self, layer: int, first: int, values: Tensor) -> None:
        """Store values [B, ...] for the output of a layer from row ``first`` of the batch on."""
        if layer not in self._held:
            with self._host():
                self._held[layer] = self._room(layer, values)
        self._held[layer][first : first + len(values)].copy_(values.detach())

    def get(self, layer: int, first: int, last: int, device: torch.device) -> Tensor:
        """What is stored for the output of a layer, on the device [B, ...]."""
        values = self._held[layer][first:last]
        return copied(values, device, values)

    def _room(self, layer: int, values: Tensor) -> Tensor:
        shape, order = (self._rows, *values.shape[1:]), dense_format(values)
        if self._folder is None:
            return torch.empty(shape, dtype=values.dtype, memory_format=order)
        flat = mapped(self._folder / f"between-{layer:03}", torch.Size(shape).numel(), values.dtype)
        return flat.as_strided(shape, torch.empty(shape, device="meta", memory_format=order).stride())


class StreamedLayer(ResidentCell):
    """A layer on the device, for its part of a step in one direction or in both."""

    def forward(self, batch: Batch, between: Between) -> None:
        """Compute the outputs of a batch, without a graph."""
        for shown, first in self._inputs(batch, between):
            with torch.no_grad(), settled(self.module), making("activations"):
                self._seed(shown)
                between.put(self.index, first, self.module(shown.streams["x"]))

    def backward(self, batch: Batch, between: Between, out: Outputs) -> None:
        """Compute the gradients of a batch and make the layer's step; the gradient of its inputs replaces them."""
        (phase, learned, optimizer), *_ = self.phases
        for shown, first in self._inputs(batch, between):
            x = shown.streams["x"]
            wanted: list[Tensor] = [*learned]
            if self.index:
                wanted.append(x.requires_grad_())
            with making("activations"):
                self._seed(shown)
                if self.node.is_last:
                    step = self._setup.objective.loss(phase.name, self.module, self.head, shown)
                    result, gradient = step.loss / batch.size, None
                    out.loss(batch.step, step.loss, step.scores, shown.y)
                else:
                    result = self.module(x)
                    with making("gradients"):
                        gradient = between.get(self.index, first, first + len(x), self._setup.device)
            if wanted and result.requires_grad:
                with making("gradients"):
                    result.backward(gradient, inputs=wanted)  # type: ignore[no-untyped-call]
            if self.index:
                between.put(self.index - 1, first, torch.zeros_like(x) if x.grad is None else x.grad)
            del result, gradient, x, shown
        self.update(learned, optimizer, batch.number)

    def train_step(self, batch: Batch, out: Outputs) -> None:
        """Both directions of a step on inputs and gradients without meaning, as in a dry run."""
        between = Between(batch.size, self._setup.host)
        for _ in batch.micro_batches():
            break  # the net's inputs stay on the device during the whole step
        if self.index:
            with self._setup.host():
                rows = torch.zeros(batch.size, *self.node.recipe.in_shape)
                between.put(self.index - 1, 0, to_channels_last(rows) if self.node.channels_last else rows)
            del rows
        self.forward(batch, between)
        self.backward(batch, between, out)

    def _inputs(self, batch: Batch, between: Between) -> Iterator[tuple[Shown, int]]:
        """Each micro-batch with its first row in the batch: the net's inputs, or outputs of the layer before."""
        if self.index == 0:
            for micro in batch.micro_batches():
                yield self._read(micro), micro.first
            return
        labels = batch.micro_batches(LABELS_ONLY) if self.node.is_last else None
        for first, last in batch.cuts():
            y = torch.empty(0) if labels is None else next(labels).read().y
            with making("activations"):
                x = between.get(self.index - 1, first, last, self._setup.device)
            yield Shown({"x": x}, y, batch.draws.of(first)), first
            del x, y

    def _seed(self, shown: Shown) -> None:
        if self.node.recipe.draws:
            shown.draws.seed_layer(self.index, shown.streams["x"])


class StreamedNet:
    """A whole net whose layers come to the device one by one in every step; implements ``stream.cell.Learner``.

    Args:
        depth: number of layers.
        layers: brings them to the device, as ``StreamedLayer``.
        between: what waits on the host.
        left: called with a layer's number when its part of a step is done.
    """

    index = 0  # as of a whole net in one cell, whose random numbers it draws

    def __init__(self, depth: int, layers: CellStream, between: Between, left: Callable[[int], None]):
        self._depth, self._layers, self._between, self._left = depth, layers, between, left
        self.train_reads: Sequence[int] = (0,) if depth == 1 else (0, LABELS_ONLY, 0)

    def set_training(self, training: bool) -> None:
        """See ``Learner``; layers are set when they come to the device."""

    def learned(self) -> Iterator[Tensor]:
        """See ``Learner``: none is on the device as a whole."""
        return iter(())

    def train_step(self, batch: Batch, out: Outputs) -> None:
        """See ``Learner``."""
        last = self._depth - 1
        order = [*((index, False) for index in range(last)), *((index, True) for index in range(last, -1, -1))]
        for (index, learns), (following, changes) in zip(order, [*order[1:], order[0]], strict=True):
            layer = self._layers.visit(index, changes=learns)
            assert isinstance(layer, StreamedLayer)
            layer.set_training(True)
            if following != index:
                self._layers.expect(following, changes)
            if learns:
                layer.backward(batch, self._between, out)
            else:
                layer.forward(batch, self._between)
            self._left(index)
            del layer
