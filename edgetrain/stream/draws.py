"""The random numbers of one step of one cell: keyed, drawn for the whole batch, sliced for micro-batches."""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgetrain.keys import derive, per_sample
from edgetrain.memory import device as devices


class StepDraws:
    """The random numbers of one (seed, cell, epoch, step); implements ``objectives.base.Draws`` for the whole batch.

    Drawing for the whole batch and slicing gives the same numbers however the batch is split.

    Args:
        seed: the run's.
        cell: its number.
        epoch: number of the epoch, or of the view that is made.
        step: number of the step in its epoch.
        samples: numbers of the batch's samples in the data set, int64 [size].
    """

    def __init__(self, seed: int, cell: int, epoch: int, step: int, samples: NDArray[np.int64]):
        self._seed, self._epoch, self._samples = seed, epoch, samples
        self._address = (seed, "step", cell, epoch, step)
        self._drawn: dict[str, Tensor] = {}

    def of(self, first: int) -> MicroBatchDraws:
        """The numbers of the micro-batch that begins at row ``first`` of the batch."""
        return MicroBatchDraws(self, first)

    def normal(self, name: str, like: Tensor, first: int = 0) -> Tensor:
        """See ``objectives.base.Draws``."""
        if name not in self._drawn:
            source = self._source(like, name)
            shape = (len(self._samples), *like.shape[1:])
            self._drawn[name] = like.new_empty(shape).normal_(generator=source)
        return self._drawn[name][first : first + like.shape[0]]

    def keep(self, name: str, like: Tensor, chance: float) -> Tensor:
        """See ``objectives.base.Draws``."""
        if name not in self._drawn:
            source = self._source(like, name)
            self._drawn[name] = torch.empty_like(like).bernoulli_(chance, generator=source)
        return self._drawn[name]

    def uniform(self, name: str, columns: int, like: Tensor, first: int = 0) -> Tensor:
        """See ``objectives.base.Draws``."""
        samples = self._samples[first : first + like.shape[0]]
        drawn = per_sample(samples, columns, self._seed, "sample", name, self._epoch)
        out = like.new_empty(drawn.shape, dtype=torch.float32)
        return out.copy_(torch.from_numpy(drawn.astype(np.float32)))

    def _source(self, like: Tensor, name: str) -> torch.Generator:
        return devices.generator(like.device).manual_seed(derive(*self._address, name))

    def seed_global(self, device: torch.device, *words: str | int) -> None:
        """Seed the global generators with this step's key, for modules that draw from them (dropout, NumPy noise).

        ``words``: of what in the step.
        """
        key = derive(*self._address, "global", *words)
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002 (a user's module may draw from it)
        torch.default_generator.manual_seed(key)
        devices.seed_default_generator(device, key)


class MicroBatchDraws:
    """Implements ``objectives.base.Draws`` for one micro-batch of a step."""

    def __init__(self, step: StepDraws, first: int):
        self._step, self._first = step, first

    def normal(self, name: str, like: Tensor) -> Tensor:
        """See ``objectives.base.Draws``."""
        return self._step.normal(name, like, self._first)

    def keep(self, name: str, like: Tensor, chance: float) -> Tensor:
        """See ``objectives.base.Draws``."""
        return self._step.keep(name, like, chance)

    def uniform(self, name: str, columns: int, like: Tensor) -> Tensor:
        """See ``objectives.base.Draws``."""
        return self._step.uniform(name, columns, like, self._first)

    def seed_layer(self, layer: int, like: Tensor) -> None:
        """See ``objectives.base.Draws``."""
        self._step.seed_global(like.device, "layer", layer, self._first)
