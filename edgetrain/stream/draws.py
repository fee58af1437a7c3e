"""The random numbers of one step of one cell: keyed, drawn whole, sliced for micro-batches."""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgetrain.keys import derive, generator, per_sample


class StepDraws:
    """Implements ``objectives.base.Draws`` for one (seed, cell, epoch, step).

    Drawing the whole batch and slicing keeps the numbers the same however the batch is cut.

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
        self.first = 0

    def normal(self, name: str, like: Tensor) -> Tensor:
        """See ``objectives.base.Draws``."""
        if name not in self._drawn:
            source = generator(like.device, *self._address, name)
            shape = (len(self._samples), *like.shape[1:])
            self._drawn[name] = torch.randn(shape, generator=source, device=like.device, dtype=like.dtype)
        return self._drawn[name][self.first : self.first + like.shape[0]]

    def keep(self, name: str, like: Tensor, chance: float) -> Tensor:
        """See ``objectives.base.Draws``."""
        if name not in self._drawn:
            source = generator(like.device, *self._address, name)
            self._drawn[name] = torch.empty_like(like).bernoulli_(chance, generator=source)
        return self._drawn[name]

    def uniform(self, name: str, columns: int, like: Tensor) -> Tensor:
        """See ``objectives.base.Draws``."""
        samples = self._samples[self.first : self.first + like.shape[0]]
        drawn = per_sample(samples, columns, self._seed, "sample", name, self._epoch)
        out = torch.empty(drawn.shape, device=like.device)
        return out.copy_(torch.from_numpy(drawn.astype(np.float32)))

    def seed_global(self, device: torch.device) -> None:
        """Point the global generators at this step, for modules that draw from them (dropout, NumPy noise)."""
        key = derive(*self._address, "global")
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002 (a user's module may draw from it)
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(key)
