"""How much is tried: the default tier takes a few minutes, the slow tier tries everything.

``pytest`` runs the default tier: of each parametrised test a few cases, chosen by their names, and of each property
and sweep a few examples. ``EDGETRAIN_EXAMPLES=10 pytest -m "slow or counted"`` runs the rest, at ten times as many
examples. A test, file or folder that is named on the command line runs with all its cases.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import xxhash

T = TypeVar("T")
TIMES = int(os.environ.get("EDGETRAIN_EXAMPLES", "1"))
#: Of a parametrised test, in the default tier, by folder: where whole runs are trained, and elsewhere.
CASES = {"training": 1, "planning": 1, "stream": 1, "report": 1}
OTHERS = 3


def examples(count: int) -> int:
    """``count`` in the default tier; multiplied by ``EDGETRAIN_EXAMPLES`` if that is set."""
    return count * TIMES


def sampled(cases: Iterable[T], one_in: int) -> list[T]:
    """A fixed sample of the cases, chosen by a hash of their ``repr``.

    Args:
        cases: all cases.
        one_in: the default tier keeps about one case in ``one_in``; ``EDGETRAIN_EXAMPLES`` divides this number, down to
            all cases.
    """
    step = max(1, one_in // TIMES)
    return [case for case in cases if rank(repr(case)) % step == 0]


def rank(name: str) -> int:
    """A hash of a name, by which cases are ordered the same way in every process."""
    return xxhash.xxh3_64_intdigest(name.encode())
