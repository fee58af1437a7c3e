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


def per_sample(samples: NDArray[np.int64], columns: int, seed: int, *words: int | str) -> NDArray[np.float64]:
    """Uniform numbers in 0..1 that belong to samples, [B, columns], whatever batch they are in.

    Counter-based: the n-th number of a named stream is a hash of n (SplitMix64: Steele, Lea and Flood,
    OOPSLA 2014), so a sample's numbers need none of the others'.
    """
    with np.errstate(over="ignore"):
        counters: NDArray[np.uint64] = np.add(
            samples.astype(np.uint64)[:, None] * np.uint64(columns), np.arange(1, columns + 1, dtype=np.uint64)
        )
        z: NDArray[np.uint64] = np.uint64(derive(seed, *words)) + counters * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53, np.float64)
