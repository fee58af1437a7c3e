"""What lives on the device side when, by kind.

The code that makes tensors says in scopes of what kind they are (``with making("weights")``). A storage
that outlives the scope it was made in is of that kind; one that is gone before, or was made in no scope,
is workspace. So no list of operations is needed: of a backward pass, what stays is the weights' gradients,
and what goes is the gradients of activations and whatever the pass computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgetrain.record import KINDS

Kind = Literal["weights", "gradients", "optimizer state", "activations", "latents", "workspace"]
_PHASES: dict[Kind | None, str] = {
    "weights": "while the cell is brought to the device",
    "optimizer state": "in the optimizer's step",
    "gradients": "in the backward pass",
    "activations": "in the forward pass",
    "latents": "while inputs or latents are made",
    None: "between the passes",
}


class making:
    """A scope in which tensors of a kind are made; scopes may be nested, and the innermost counts."""

    __slots__ = ("is_open", "kind")

    def __init__(self, kind: Kind):
        self.kind, self.is_open = kind, False

    def __enter__(self) -> making:
        self.is_open = True
        _scopes.open.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_open = False
        _scopes.open.remove(self)


class _Scopes(threading.local):
    """The scopes that a thread is in, innermost last."""

    def __init__(self) -> None:
        self.open: list[making] = []


_scopes = _Scopes()


class Timeline:
    """Storages that come and go, in order, with their kinds; a listener of ``LiveBytes``.

    Attributes:
        peak: most bytes at once.
    """

    def __init__(self) -> None:
        self.peak = self._live = 0
        self._peak_scope: Kind | None = None
        self._changes: list[tuple[int, int]] = []  # storage; bytes, negative when it goes
        self._sizes: dict[int, int] = {}  # of storages that live
        self._scopes: dict[int, making | None] = {}
        self._kinds: dict[int, Kind] = {}  # of storages that are gone

    def alloc(self, key: int, size: int) -> None:
        """Storage ``key`` came, with ``size`` bytes."""
        scope = _scopes.open[-1] if _scopes.open else None
        self._changes.append((key, size))
        self._sizes[key], self._scopes[key] = size, scope
        self._live += size
        if self._live > self.peak:
            self.peak, self._peak_scope = self._live, scope.kind if scope else None

    def free(self, key: int) -> None:
        """Storage ``key`` went."""
        size = self._sizes.pop(key)
        self._changes.append((key, -size))
        self._kinds[key] = _kind(self._scopes.pop(key))
        self._live -= size

    @property
    def changes(self) -> int:
        """How many there were so far."""
        return len(self._changes)

    @property
    def peak_phase(self) -> str:
        """When the peak is reached, in words."""
        return _PHASES[self._peak_scope]

    def bytes_by_kind(self) -> NDArray[np.int64]:
        """Live bytes after each change, [changes, kinds], in the order of ``KINDS``."""
        kinds = {key: _kind(scope) for key, scope in self._scopes.items()} | self._kinds
        steps = np.zeros((len(self._changes), len(KINDS)), np.int64)
        for row, (key, size) in enumerate(self._changes):
            steps[row, KINDS.index(kinds[key])] = size
        return np.cumsum(steps, axis=0)


def _kind(scope: making | None) -> Kind:
    return "workspace" if scope is None or scope.is_open else scope.kind


def thinned(series: NDArray[np.int64], points: int) -> NDArray[np.int64]:
    """At most ``points`` rows of a series of bytes by kind: of each stretch the one with the most bytes in all.

    Args:
        series: [changes, kinds].
        points: at least 1.
    """
    if len(series) <= points:
        return series
    edges: Sequence[int] = np.linspace(0, len(series), points + 1).astype(int).tolist()
    totals = series.sum(1)
    rows = [first + int(totals[first:last].argmax()) for first, last in pairwise(edges)]
    return series[rows]
