"""What a person would look for during a run: cells that do not learn, are dead, or get worse."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgetrain.planning.schedule import Visit
from edgetrain.planning.workload import Workload
from edgetrain.record import CellRecord
from edgetrain.stream.cell import Learner
from edgetrain.stream.latents import Latents

_LEAST_EPOCHS = 3  # of a loss, to say that it does not fall


class Diagnostics:
    """Says once for each cell what is wrong with it, and what to try.

    Args:
        work: the run.
        records: what cells measured.
        say: shows a line to the user.
    """

    def __init__(self, work: Workload, records: list[CellRecord], say: Callable[[str], None]):
        self._work, self._records, self._say = work, records, say
        self._before: list[tuple[float, float]] | None = None
        self._said: set[tuple[int, str]] = set()

    def begins(self, visit: Visit, cell: Learner, whole: bool) -> None:
        """A visit is about to train a cell, ``whole`` if from its first step on."""
        self._before = _fingerprint(cell) if whole and visit.epoch == 0 and visit.first == 0 else None

    def trained(self, visit: Visit, cell: Learner) -> None:
        """The visit's steps are done."""
        if self._before and self._before == _fingerprint(cell):
            self._once(
                visit.node,
                "still",
                "did not change in its first epoch: its gradients are zero or --lr is too small; try a larger --lr,"
                " and check its inputs",
            )

    def emitted(self, visit: Visit, latents: Latents) -> None:
        """The visit's latents are there."""
        if not latents.alive():
            self._once(
                visit.node,
                "dead",
                "outputs only zeros, so later cells cannot learn: its units are dead; try a smaller"
                " --lr, another --seed, or a net with biases or normalisation",
            )

    def visited(self, visit: Visit) -> None:
        """The visit's losses are in the record. Rules of several phases play against themselves: no loss need fall."""
        losses = self._records[visit.node].losses
        several = visit.node < self._work.depth and len(self._work.objective.phases) > 1
        if visit.final and not several and len(losses) >= _LEAST_EPOCHS and min(losses[1:]) >= losses[0]:
            self._once(
                visit.node,
                "loss",
                f"did not lower its loss: {losses[0]:.4g} in its first epoch, {losses[-1]:.4g} in the last; try a"
                " smaller --lr, and check that labels and inputs belong together",
            )

    def _once(self, node: int, kind: str, text: str) -> None:
        if (node, kind) not in self._said:
            self._said.add((node, kind))
            self._say(f"cell {node + 1} ({self._records[node].name}) {text}")


def _fingerprint(cell: Learner) -> list[tuple[float, float]]:
    """Sum and norm of each learned tensor that is on the device."""
    with torch.no_grad():  # in float32: a wider type would copy the tensor on the device
        return [(float(value.sum()), float(torch.linalg.vector_norm(value))) for value in cell.learned()]
