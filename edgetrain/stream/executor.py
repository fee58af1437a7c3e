"""Runs steps of one cell: forward, loss, backward and update, in one piece or in micro-batches.

The same code runs on a GPU, on the CPU, and over fake tensors in the planner's dry run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetrain.data.augment import Augmentation
from edgetrain.errors import DivergedError
from edgetrain.memory.meter import Meter
from edgetrain.memory.timeline import making
from edgetrain.objectives.base import Batch, Node, Objective, Streams
from edgetrain.stream.cell import LiveCell, copied
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.feed import Feed, Part, Slice
from edgetrain.stream.latents import Sink
from edgetrain.stream.saved import saved_on_host
from edgetrain.stream.tiles import Sweeps, TiledCell

_KEPT_STEPS = 1024  # losses that stay on the device before they are read, so that no step waits


@dataclass(frozen=True)
class Sums:
    """What a visit's steps have come to: summed loss over ``samples``, and right answers among ``scored``."""

    loss: float = 0.0
    samples: int = 0
    correct: int = 0
    scored: int = 0

    @property
    def means(self) -> tuple[float, float | None]:
        """Mean loss, and accuracy where there are scores."""
        return self.loss / max(self.samples, 1), self.correct / self.scored if self.scored else None


_NO_SUMS = Sums()


class Tally:
    """Loss and training accuracy of a visit, summed on the device and read now and then.

    Args:
        device: where losses are made.
        where: names the cell and epoch if a loss is not finite.
        before: what the visit's earlier steps came to.
    """

    def __init__(self, device: torch.device, where: str = "", before: Sums = _NO_SUMS):
        self._where, self._read = where, before
        self._samples, self._scored = before.samples, before.scored
        self._losses = torch.zeros(_KEPT_STEPS, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._steps: list[int] = []

    def add(self, part: Part, loss: Tensor, scores: Tensor | None) -> None:
        """Count one part: its summed loss and, if there are scores [B, C], its correct answers."""
        if part.first == 0:
            if len(self._steps) == _KEPT_STEPS:
                self.read()
            self._steps.append(part.step)
        slot = len(self._steps) - 1
        self._losses[slot : slot + 1] += loss.detach()
        self._samples += part.last - part.first
        if scores is not None:
            self._correct += (scores.argmax(1) == part.y).sum()
            self._scored += part.last - part.first

    def read(self) -> Sums:
        """The sums so far; this waits for the device.

        Raises:
            DivergedError: a loss is not finite; the message names the first such step.
        """
        losses = self._losses[: len(self._steps)].tolist()
        for step, loss in zip(self._steps, losses, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"{self._where} step {step}: the loss is {loss}; try a smaller --lr, and look for extreme"
                    " values in the inputs"
                )
        self._losses.zero_()
        # A step whose parts are not all in goes on in the same slot.
        self._steps.clear()
        correct = int(self._correct.item())
        self._correct.zero_()
        before = self._read
        loss, correct = before.loss + math.fsum(losses), before.correct + correct
        self._read = Sums(loss, self._samples, correct, self._scored)
        return self._read


def _never(step: int) -> bool:
    return False


class Executor:
    """Carries out visits on cells that are on the device.

    Args:
        objective: the local rule.
        device: where cells are.
        meter: watches the device side.
        seed: the run's.
        augmentation: changes what the first cell learns from; ``None``: the inputs as they are.
    """

    def __init__(
        self,
        objective: Objective,
        device: torch.device,
        meter: Meter,
        seed: int,
        augmentation: Augmentation | None = None,
    ):
        self._objective, self._device, self._meter, self._seed = objective, device, meter, seed
        self._augmentation = augmentation

    def train(
        self,
        cell: LiveCell | TiledCell,
        feed: Feed,
        work: Slice,
        epoch: int,
        tally: Tally,
        sink: Sink | None = None,
        pause: Callable[[int], bool] = _never,
    ) -> int:
        """Train the cell on a range of steps, emitting its latents from before each update to ``sink``.

        Args:
            cell: on the device.
            feed: of what it reads.
            work: the steps.
            epoch: of the cell.
            tally: takes losses.
            sink: where latents go, or ``None``.
            pause: asked after each step, given its number, whether to end before the next.

        Returns:
            One behind the last step that was done.
        """
        if isinstance(cell, LiveCell):
            cell.train()
        parts = feed.parts(work)
        try:
            for step, start, stop in work.steps():
                with self._meter.watch(("train", stop - start)):
                    draws = StepDraws(self._seed, cell.node.index, epoch, step, work.samples(start, stop))
                    if isinstance(cell, TiledCell):
                        sweeps = Sweeps(self._objective, self._drawn_inputs(cell.node, draws))
                        sweeps.train(cell, parts, work, stop - start, draws, tally.add, sink)
                    else:
                        self._train_step(cell, parts, work, stop - start, draws, tally, sink)
                if pause(step):
                    return step + 1
        finally:
            _close(parts)
        return work.last

    def emit(
        self,
        cell: LiveCell | TiledCell,
        feed: Feed,
        work: Slice,
        sink: Sink | None,
        view: int = 0,
        pause: Callable[[int], bool] = _never,
    ) -> int:
        """Run the finished cell over the training samples, latents to ``sink``.

        Args:
            cell: on the device.
            feed: of what it reads.
            work: the steps, in sample order.
            sink: where latents go; views lie there one behind the other.
            view: of the data set; the first cell makes it, drawing what an epoch of that number draws.
            pause: asked after each step, given its number, whether to end before the next.

        Returns:
            One behind the last step that was done.
        """
        base = view * work.rows

        def inputs(part: Part) -> Streams:
            draws = StepDraws(self._seed, cell.node.index, view, part.step, work.samples(part.start, part.stop))
            return self._drawn_inputs(cell.node, draws)(part)

        def emit(parts: Iterator[Part], size: int) -> None:
            if isinstance(cell, TiledCell):
                start, rows = Sweeps(self._objective, inputs).emit(cell, parts, work, size)
                if sink is not None:
                    sink.put(base + start, rows)
                return
            for _ in work.parts(size):
                part = next(parts)
                with making("latents"):
                    latents = self._objective.latent(cell.module, inputs(part))
                if sink is not None:
                    sink.put(base + part.start + part.first, latents)
                part.streams = {}

        return self._without_gradients("emit", cell, feed, work, emit, pause)

    def read(
        self,
        cell: LiveCell | TiledCell,
        feed: Feed,
        work: Slice,
        sink: Sink | None,
        on_scores: Callable[[Part, Tensor | None, Streams], None],
    ) -> None:
        """Run the finished cell over samples whose classes are to be found, scores [B, C] to ``on_scores``.

        Batches are not cut further here. Latents of a tiled cell are given on the host, but for the stream that
        a trained classifier reads.
        """

        def inputs(part: Part) -> Streams:
            return self._objective.unlabelled_streams(part.streams["x"]) if cell.node.index == 0 else part.streams

        def read(parts: Iterator[Part], size: int) -> None:
            latents: Streams
            if isinstance(cell, TiledCell):
                part, scores, rows = Sweeps(self._objective, inputs).read(cell, parts, size)
                latents = rows
            else:
                part = next(parts)
                with making("latents"):
                    latents, scores = self._objective.read(cell.module, cell.head, inputs(part))
            if sink is not None:
                sink.put(part.start, latents)
            if isinstance(cell, TiledCell) and self._objective.trains_classifier:
                stream = self._objective.classifier_stream
                latents = {**latents, stream: copied(latents[stream], self._device)}
            on_scores(part, scores, latents)
            part.streams = {}

        self._without_gradients("read", cell, feed, work, read)

    def _without_gradients(
        self,
        kind: str,
        cell: LiveCell | TiledCell,
        feed: Feed,
        work: Slice,
        use: Callable[[Iterator[Part], int], None],
        pause: Callable[[int], bool] = _never,
    ) -> int:
        if isinstance(cell, LiveCell):
            cell.eval()
        parts = feed.parts(work)
        try:
            for step, start, stop in work.steps():
                with self._meter.watch((kind, stop - start)), torch.no_grad():
                    use(parts, stop - start)
                if pause(step):
                    return step + 1
        finally:
            _close(parts)
        return work.last

    def _train_step(
        self,
        cell: LiveCell,
        parts: Iterator[Part],
        work: Slice,
        size: int,
        draws: StepDraws,
        tally: Tally,
        sink: Sink | None,
    ) -> None:
        self._seed_if_drawing(cell, draws)
        for _ in work.parts(size):
            self._train_part(cell, next(parts), draws, tally, sink)

    def _seed_if_drawing(self, cell: LiveCell, draws: StepDraws) -> None:
        if cell.node.recipe is not None and cell.node.recipe.draws:
            draws.seed_global(self._device)

    def _train_part(self, cell: LiveCell, part: Part, draws: StepDraws, tally: Tally, sink: Sink | None) -> None:
        phase, learned, optimizer = cell.phases[part.phase]
        draws.first = part.first
        emitting = sink if part.phase == 0 else None
        self._backward(cell, part, draws, tally, emitting, phase.name, learned)
        part.streams = {}
        if part.closes:
            with making("optimizer state"):
                optimizer.step()
            for parameter in learned:
                parameter.grad = None

    def _backward(
        self,
        cell: LiveCell,
        part: Part,
        draws: StepDraws,
        tally: Tally,
        sink: Sink | None,
        phase: str,
        learned: list[torch.nn.Parameter],
    ) -> None:
        with making("latents"):
            streams = self._drawn_inputs(cell.node, draws)(part)
        with making("activations"), self._saving(cell):
            step = self._objective.loss(phase, cell.module, cell.head, Batch(streams, part.y, draws))
        if sink is not None and step.emitted is not None:
            sink.put(part.start + part.first, step.emitted)
        elif sink is not None:
            sink.put(part.start + part.first, self._clean(cell, streams))
        if part.phase == 0:
            tally.add(part, step.loss, step.scores)
        if learned:
            with making("gradients"):
                (step.loss / part.size).backward(inputs=learned)  # type: ignore[no-untyped-call]

    def _clean(self, cell: LiveCell, streams: Streams) -> Streams:
        """Latents of clean inputs from the weights before the update."""
        with torch.no_grad(), making("latents"):
            return self._objective.latent(cell.module, streams)

    def _drawn_inputs(self, node: Node, draws: StepDraws) -> Callable[[Part], Streams]:
        """What a cell learns from, of a part; the first cell's inputs are augmented and made into streams."""

        def inputs(part: Part) -> Streams:
            draws.first = part.first
            if node.index > 0:
                return part.streams
            x = part.streams["x"]
            if self._augmentation is not None:
                x = self._augmentation(x, draws.uniform("augmentation", self._augmentation.columns, x))
            return self._objective.streams(x, part.y, draws)

        return inputs

    def _saving(self, cell: LiveCell) -> AbstractContextManager[object]:
        if not self._objective.saves_on_host:
            return nullcontext()
        return saved_on_host(self._device, self._meter.host, (value for _, value in cell.parameters()))


def _close(parts: Iterator[Part]) -> None:
    """End the feed's thread now, not when the generator is collected."""
    close = getattr(parts, "close", None)
    if close is not None:
        close()
