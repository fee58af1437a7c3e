"""A stratified split that any machine draws alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetrain.keys import derive

TEST_SHARE = 0.2
_SEED = 0  # fixed: the split belongs to the data, not to a run


def stratified(labels: NDArray[np.int64], test_rows: int, name: str) -> NDArray[np.bool_]:
    """Which rows [N] are test rows: each class in proportion, at least one row of it kept for training.

    Args:
        labels: [N], int64, from 0 on.
        test_rows: how many to take; fewer are taken where classes are too small.
        name: names the draw; equal labels and names give equal splits.
    """
    chosen = np.zeros(len(labels), np.bool_)
    counts = np.bincount(labels)
    by_label = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])  # rows of each, in order
    for label, (members, take) in enumerate(zip(by_label, _quotas(counts, test_rows), strict=True)):
        source = np.random.Generator(np.random.Philox(derive(_SEED, "split", name, label)))
        chosen[source.permutation(members)[:take]] = True
    return chosen


def _quotas(counts: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Test rows of each class by largest remainder; the lower class wins a tie."""
    exact = counts * (total / counts.sum())
    quotas: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quotas - exact, kind="stable")
    able = by_remainder[(counts - quotas)[by_remainder] > 1]
    quotas[able[: total - int(quotas.sum())]] += 1
    return quotas
