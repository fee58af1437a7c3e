"""Randomness, keyed: every draw has an address, and no draw comes from a shared stream.

What belongs to a cell (weights, noise, masks) is keyed by (seed, cell, epoch, step). What chooses
data (the order of an epoch, a split) is keyed by (seed, epoch), never by cell. So any order of
visits draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Generator


def derive(seed: int, *words: int | str) -> int:
    """A 63-bit key for the draw that ``words`` names; equal words give equal keys on any machine."""
    text = "/".join([str(seed), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, seed: int, *words: int | str) -> Generator:
    """A torch generator on ``device`` that stands at the start of the named draw."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, *words))


@contextmanager
def seeded(seed: int, *words: int | str) -> Iterator[None]:
    """Let code that draws from torch's global CPU generator draw from the named key instead."""
    import torch

    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(derive(seed, *words))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def epoch_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The order in which an epoch takes its samples: a permutation of ``range(rows)``, int64."""
    source = np.random.Generator(np.random.Philox(derive(seed, "order", epoch)))
    return source.permutation(rows)
