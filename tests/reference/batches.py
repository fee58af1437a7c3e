"""The batches of an epoch, for the references of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgetrain.keys import epoch_order


def shuffled(seed: int, epoch: int, rows: int, size: int) -> Iterator[Tensor]:
    """Sample numbers of each batch, in the order of the epoch; the short last batch is kept."""
    order = torch.from_numpy(epoch_order(seed, epoch, rows))
    yield from order.split(size)


def as_they_lie(rows: int, size: int) -> Iterator[Tensor]:
    """Sample numbers of each batch, in the order of the data set."""
    yield from torch.arange(rows).split(size)
