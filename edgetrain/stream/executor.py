"""Runs a cell over a range of steps: one loop for every kind of cell and every pass.

The same code runs on a GPU, on the CPU, and over fake tensors in the planner's dry run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Literal

import torch

from edgetrain.memory.meter import Meter
from edgetrain.stream.cell import Cell
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.outputs import Outputs
from edgetrain.stream.reader import Reader
from edgetrain.stream.span import Span

#: ``train``: steps of the optimizer; ``emit``: latents of the finished cell; ``evaluate``: latents and scores.
Pass = Literal["train", "emit", "evaluate"]


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

    def run(
        self,
        kind: Pass,
        cell: Cell,
        reader: Reader,
        span: Span,
        out: Outputs,
        pause: Callable[[int], bool] = _never,
    ) -> int:
        """Run a pass of the cell over a range of steps.

        Args:
            kind: which pass.
            cell: on the device.
            reader: of the sources that it reads.
            span: the steps.
            out: takes the results.
            pause: asked after each step, given its number, whether to end before the next.

        Returns:
            One past the last step that was done.
        """
        trains = kind == "train"
        step = {"train": cell.train_step, "emit": cell.emit, "evaluate": cell.evaluate}[kind]
        cell.set_training(trains)
        reads = cell.train_reads if trains else cell.reads
        with reader.batches(span, reads, partial(StepDraws, self._seed, cell.index, span.epoch)) as batches:
            for batch in batches:
                with self._meter.watch((kind, batch.size)), nullcontext() if trains else torch.no_grad():
                    step(batch, out)
                if pause(batch.step):
                    return batch.step + 1
        return span.last
