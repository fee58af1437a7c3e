"""The random numbers of one step of one cell: keyed, drawn whole, sliced for micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from edgetrain.keys import derive, generator


class StepDraws:
    """Implements ``objectives.base.Draws`` for one (seed, cell, epoch, step).

    Drawing the whole batch and slicing keeps the numbers the same however the batch is cut.
    """

    def __init__(self, seed: int, cell: int, epoch: int, step: int, rows: int):
        self._address = (seed, "step", cell, epoch, step)
        self._rows = rows
        self._drawn: dict[str, Tensor] = {}
        self.first = 0

    def normal(self, name: str, like: Tensor) -> Tensor:
        """See ``objectives.base.Draws``."""
        if name not in self._drawn:
            source = generator(like.device, *self._address, name)
            shape = (self._rows, *like.shape[1:])
            self._drawn[name] = torch.randn(shape, generator=source, device=like.device, dtype=like.dtype)
        return self._drawn[name][self.first : self.first + like.shape[0]]

    def seed_global(self, device: torch.device) -> None:
        """Point torch's global generator at this step, for modules that draw from it (dropout)."""
        key = derive(*self._address, "global")
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(key)
