"""The order of visits. A schedule is pure: it touches no tensor and knows no method.

Node *(cell i, step k)* of the training graph needs *(i, k-1)* and the latents of batch k from cell
i-1; the classifier needs every cell's. Any order that respects this gives the same weights.

Cells are numbered 0..depth-1, the classifier is ``depth``. Latents are numbered by who reads them:
latents 0 are the prepared inputs, latents i+1 are what cell i emits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Emission = Literal["none", "training", "finished"]


@dataclass(frozen=True)
class Visit:
    """One stay of a cell on the device.

    Attributes:
        node: the cell, or ``depth`` for the classifier.
        epoch: number of the epoch, counted for each cell on its own.
        first: first step.
        last: one behind the last step.
        emit: ``training``: latents from before each update, in step order; ``finished``: after the
            steps, from the finished cell, in sample order.
        frees: latents that nobody reads after this visit, until they are emitted anew.
        final: whether the cell is finished after this visit.
        frontier: whether the run can go on from here with committed cells alone, without any latents
            that only unfinished cells could have emitted.
    """

    node: int
    epoch: int
    first: int
    last: int
    emit: Emission
    frees: tuple[int, ...]
    final: bool
    frontier: bool


def separate(
    depth: int, epochs: int, steps: int, readout_epochs: int = 0, reads: tuple[int, ...] = ()
) -> Iterator[Visit]:
    """Each cell is finished before the next begins; its latents are cached once.

    Args:
        depth: number of cells.
        epochs: of each.
        steps: of an epoch.
        readout_epochs: of the classifier; 0: there is none.
        reads: the cells whose latents the classifier reads.
    """
    for node in range(depth):
        hands_on = node in reads or node < depth - 1
        for epoch in range(epochs):
            final = epoch == epochs - 1
            frees: tuple[int, ...] = (node,) if final and node - 1 not in reads else ()
            emit: Emission = "finished" if final and hands_on else "none"
            yield Visit(node, epoch, 0, steps, emit, frees, final, frontier=True)
    for epoch in range(readout_epochs):
        final = epoch == readout_epochs - 1
        frees = tuple(node + 1 for node in reads) if final else ()
        yield Visit(depth, epoch, 0, steps, "none", frees, final, frontier=True)


def sequence(
    depth: int, epochs: int, steps: int, readout_epochs: int = 0, reads: tuple[int, ...] = ()
) -> Iterator[Visit]:
    """Within each epoch, each cell in turn while it emits; the classifier ends the epoch. See ``separate``."""
    for epoch in range(epochs):
        final = epoch == epochs - 1
        for node in range(depth):
            hands_on = node in reads or node < depth - 1
            frees = (node,) if node and node - 1 not in reads else ()
            last_of_epoch = node == depth - 1 and not readout_epochs
            yield Visit(node, epoch, 0, steps, "training" if hands_on else "none", frees, final, last_of_epoch)
        if readout_epochs:
            read = tuple(node + 1 for node in reads)
            yield Visit(depth, epoch, 0, steps, "none", read, final, frontier=True)


SCHEDULES: dict[str, Callable[[int, int, int, int, tuple[int, ...]], Iterator[Visit]]] = {
    "separate": separate,
    "sequence": sequence,
}
