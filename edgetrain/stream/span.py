"""A range of an epoch's steps: which samples each batch holds, and how it is split into micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetrain.store.latents import Rows


@dataclass(frozen=True)
class Span:
    """A contiguous range of steps of one epoch.

    Attributes:
        rows: samples in the data set.
        batch_size: samples of a step; the last step of an epoch may have fewer.
        micro_batch: samples that are on the device at once.
        first: first step of the range.
        last: one past the last step.
        order: the epoch's order of samples [rows], int64; ``None``: in order of their numbers.
        view: of several cached views of the data set, the one whose latents are read.
        epoch: number of the epoch, for random numbers.
    """

    rows: int
    batch_size: int
    micro_batch: int
    first: int
    last: int
    order: NDArray[np.int64] | None = None
    view: int = 0
    epoch: int = 0

    def bounds(self, step: int) -> tuple[int, int]:
        """First row of a step's batch and one past its last, counted in the epoch's order."""
        start = step * self.batch_size
        return start, min(start + self.batch_size, self.rows)

    def micro_batches(self, size: int) -> list[tuple[int, int]]:
        """(first, one past the last) row of each micro-batch of a batch with ``size`` rows."""
        return [(first, min(first + self.micro_batch, size)) for first in range(0, size, self.micro_batch)]

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers of the samples that the epoch visits from ``start`` to before ``stop``."""
        return np.arange(start, stop) if self.order is None else self.order[start:stop]

    def source_rows(self, start: int, stop: int, step_order: bool) -> Rows:
        """Rows of a source that hold these samples; the views of a data set follow each other in it."""
        if step_order or self.order is None:
            shift = 0 if step_order else self.view * self.rows
            return slice(start + shift, stop + shift)
        return self.order[start:stop] + self.view * self.rows

    def label_rows(self, start: int, stop: int) -> Rows:
        """Rows of the labels of these samples."""
        return slice(start, stop) if self.order is None else self.order[start:stop]
