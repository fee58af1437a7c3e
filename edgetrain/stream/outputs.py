"""Where a visit's results go: latents to a sink, losses and training accuracy to sums, scores to who asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edgetrain.errors import DivergedError
from edgetrain.objectives.base import Streams
from edgetrain.record import Sums
from edgetrain.stream.latents import Sink

_KEPT_STEPS = 1024  # losses that stay on the device before they are read, so that no step waits


_NO_SUMS = Sums()


class Tally:
    """Loss and training accuracy of a visit, summed on the device and read now and then.

    Args:
        device: where losses are made.
        where: names the cell and epoch if a loss is not finite.
        before: sums of the visit's earlier steps.
    """

    def __init__(self, device: torch.device, where: str = "", before: Sums = _NO_SUMS):
        self._where, self._read = where, before
        self._samples, self._scored = before.samples, before.scored
        self._losses = torch.zeros(_KEPT_STEPS, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._steps: list[int] = []

    def add(self, step: int, loss: Tensor, scores: Tensor | None, y: Tensor) -> None:
        """Count a micro-batch of a step.

        Args:
            step: number of the step.
            loss: sum over the samples, a scalar.
            scores: [B, C], or ``None``.
            y: labels [B].
        """
        if not self._steps or self._steps[-1] != step:
            if len(self._steps) == _KEPT_STEPS:
                self.read()
            self._steps.append(step)
        slot = len(self._steps) - 1
        self._losses[slot : slot + 1] += loss.detach()
        self._samples += len(y)
        if scores is not None:
            self._correct += (scores.argmax(1) == y).sum()
            self._scored += len(y)

    def read(self) -> Sums:
        """The sums so far; this waits for the device. Call it between steps.

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
        self._steps.clear()
        correct = int(self._correct.item())
        self._correct.zero_()
        before = self._read
        loss, correct = before.loss + math.fsum(losses), before.correct + correct
        self._read = Sums(loss, self._samples, correct, self._scored)
        return self._read


#: Takes the first row, the scores [B, C] (``None``: the cell has no vote) and the latents of a batch.
OnScores = Callable[[int, Tensor | None, Streams], None]


class Outputs:
    """Takes the results of a cell's steps while they exist.

    Args:
        tally: takes losses.
        sink: takes latents, or ``None`` if they are not read.
        base: number of the sink's row for row 0 of the epoch.
        on_scores: takes scores.
    """

    def __init__(
        self,
        tally: Tally | None = None,
        sink: Sink | None = None,
        base: int = 0,
        on_scores: OnScores | None = None,
    ):
        self._tally, self._sink, self._base, self._on_scores = tally, sink, base, on_scores

    @property
    def takes_latents(self) -> bool:
        """Whether anybody reads the latents."""
        return self._sink is not None

    def latents(self, start: int, streams: Mapping[str, Tensor]) -> None:
        """Latents [B, ...] of the samples from row ``start`` of the epoch's order on."""
        if self._sink is not None:
            self._sink.put(self._base + start, streams)

    def loss(self, step: int, loss: Tensor, scores: Tensor | None, y: Tensor) -> None:
        """See ``Tally.add``."""
        if self._tally is not None:
            self._tally.add(step, loss, scores, y)

    def scores(self, start: int, scores: Tensor | None, latents: Streams) -> None:
        """Scores [B, C] of the samples from row ``start`` on, and their latents."""
        if self._on_scores is not None:
            self._on_scores(start, scores, latents)
