"""Runs a cell over a range of steps: one loop for every kind of cell and every pass.

The same code runs on a GPU, on the CPU, and over fake tensors in the planner's dry run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch

from edgetrain.memory.meter import Meter
from edgetrain.stream.cell import Cell, Learner
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.outputs import Outputs
from edgetrain.stream.reader import Batch, Reader
from edgetrain.stream.span import Span

#: ``emit``: latents of the finished cell; ``evaluate``: latents and scores.
Reading = Literal["emit", "evaluate"]


def _never(step: int) -> bool:
    return False


class Executor:
    """Carries out passes of cells that are on the device.

    Args:
        meter: watches the device side.
        seed: the run's.
    """

    def __init__(self, meter: Meter, seed: int):
        self._meter, self._seed = meter, seed

    def train(
        self, cell: Learner, reader: Reader, span: Span, out: Outputs, pause: Callable[[int], bool] = _never
    ) -> int:
        """Let the cell learn from a range of steps.

        Args:
            cell: on the device.
            reader: of the sources that it reads.
            span: the steps.
            out: takes the results.
            pause: asked after each step, given its number, whether to end before the next.

        Returns:
            One past the last step that was done.
        """
        cell.set_training(True)
        return self._run("train", cell, cell.train_step, cell.train_reads, reader, span, out, pause)

    def run(
        self,
        kind: Reading,
        cell: Cell,
        reader: Reader,
        span: Span,
        out: Outputs,
        pause: Callable[[int], bool] = _never,
    ) -> int:
        """Read latents, or latents and scores, off the finished cell for a range of steps; see ``train``."""
        cell.set_training(False)
        with torch.no_grad():
            step = cell.emit if kind == "emit" else cell.evaluate
            return self._run(kind, cell, step, cell.reads, reader, span, out, pause)

    def _run(
        self,
        kind: str,
        cell: Learner,
        step: Callable[[Batch, Outputs], None],
        reads: Sequence[int],
        reader: Reader,
        span: Span,
        out: Outputs,
        pause: Callable[[int], bool],
    ) -> int:
        with reader.batches(span, reads, partial(StepDraws, self._seed, cell.index, span.epoch)) as batches:
            for batch in batches:
                with self._meter.watch((kind, batch.size)):
                    step(batch, out)
                if pause(batch.step):
                    return batch.step + 1
        return span.last
