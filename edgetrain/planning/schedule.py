"""The order of visits. A schedule is pure: it touches no tensor and knows no method.

Node *(cell i, step k)* of the training graph needs *(i, k-1)* and the latents of batch k from cell
i-1; the classifier needs every cell's. Any order that respects this gives the same weights.

Cells are numbered 0..depth-1, the classifier is ``depth``. Latents are numbered by who reads them:
latents 0 are the prepared inputs, latents i+1 are what cell i emits.

Where the disk cannot hold an epoch's latents, epochs are cut into ranges of steps. ``sequence`` then goes
through all cells range by range. ``separate`` lets finished cells emit a range again, beginning at the last
latents that are cached whole, whenever the cell that learns needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Emission = Literal["none", "training", "finished", "again", "onward", "cached"]


@dataclass(frozen=True)
class Visit:
    """One stay of a cell on the device.

    Attributes:
        node: the cell, or ``depth`` for the classifier.
        epoch: number of the epoch, counted for each cell on its own.
        first: first step.
        last: one past the last step.
        emit: ``training``: latents from before each update, in step order; ``finished``: after the
            steps, from the finished cell, in sample order, of all samples. The others train nothing, but let a
            finished cell emit a range: ``again``: in the order of the epoch's steps; ``onward``: in sample
            order, for the next cell; ``cached``: into the latents of all samples.
        frees: latents that are not read after this visit until they are emitted again.
        final: whether this visit finishes the cell's training.
        frontier: whether the run can continue from here with the cells of a checkpoint alone, without any latents
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

    @property
    def trains(self) -> bool:
        """Whether the cell learns; otherwise it only emits."""
        return self.emit not in ("again", "onward", "cached")

    @property
    def lasting(self) -> bool:
        """Whether a run that is resumed behind this visit needs what it emitted."""
        return self.emit in ("finished", "onward", "cached")


@dataclass(frozen=True)
class Cut:
    """How much of the latents is on disk at once.

    Attributes:
        ranges: parts into which the steps of an epoch are cut.
        cached: the latents of all samples that ``separate`` keeps, by number, the inputs (0) among them;
            ``None``: all that are read.
    """

    ranges: int = 1
    cached: frozenset[int] | None = None

    def steps(self, steps: int) -> list[tuple[int, int]]:
        """(first, one past the last) step of each range of an epoch."""
        size = -(-steps // self.ranges)
        return [(first, min(first + size, steps)) for first in range(0, steps, size)]


WHOLE = Cut()


def separate(
    depth: int, epochs: int, steps: int, classifier_epochs: int = 0, reads: tuple[int, ...] = (), cut: Cut = WHOLE
) -> Iterator[Visit]:
    """Each cell is finished before the next begins; its latents are cached once.

    Args:
        depth: number of cells.
        epochs: of each.
        steps: of an epoch.
        classifier_epochs: of the classifier; 0: there is none.
        reads: the cells whose latents the classifier reads.
        cut: what is cached, and in which ranges the rest is emitted again.
    """
    if cut.cached is not None:
        yield from _again(depth, epochs, cut.steps(steps), classifier_epochs, reads, cut.cached)
        return
    for node in range(depth):
        emits = node in reads or node < depth - 1
        for epoch in range(epochs):
            final = epoch == epochs - 1
            frees: tuple[int, ...] = (node,) if final and node - 1 not in reads else ()
            emit: Emission = "finished" if final and emits else "none"
            yield Visit(node, epoch, 0, steps, emit, frees, final, frontier=True)
    for epoch in range(classifier_epochs):
        final = epoch == classifier_epochs - 1
        frees = tuple(node + 1 for node in reads) if final else ()
        yield Visit(depth, epoch, 0, steps, "none", frees, final, frontier=True)


def _again(
    depth: int,
    epochs: int,
    ranges: list[tuple[int, int]],
    classifier_epochs: int,
    reads: tuple[int, ...],
    cached: frozenset[int],
) -> Iterator[Visit]:
    """``separate`` with few latents cached: what else a cell reads is emitted again, range by range."""
    base = 0  # the last latents that are cached
    for node in range(depth):
        between = range(base, node)
        caches = node + 1 in cached and node < depth - 1
        done = (base,) if base and (caches or node == depth - 1) else ()
        for epoch in range(epochs):
            for first, last in ranges if between else [(0, ranges[-1][1])]:
                final = epoch == epochs - 1 and last == ranges[-1][1]
                yield from _emitting(between, epoch, first, last, "again")
                frees = (node,) * bool(between) + done * (final and not (caches and between))
                emit: Emission = "finished" if final and caches and not between else "none"
                yield Visit(node, epoch, first, last, emit, frees, final, frontier=True)
        for first, last in ranges if caches and between else []:
            yield from _emitting(between, epochs - 1, first, last, "onward")
            frees = (node, *(done if last == ranges[-1][1] else ()))
            yield Visit(node, epochs - 1, first, last, "cached", frees, final=False, frontier=True)
        base = node + 1 if caches else base
    for epoch in range(classifier_epochs):
        for first, last in ranges:
            read = tuple(node + 1 for node in reads)
            yield from _emitting(range(max(reads) + 1), epoch, first, last, "again", keeps=read)
            final = epoch == classifier_epochs - 1 and last == ranges[-1][1]
            yield Visit(depth, epoch, first, last, "none", read, final, frontier=True)


def _emitting(
    nodes: Iterable[int], epoch: int, first: int, last: int, emit: Emission, keeps: tuple[int, ...] = ()
) -> Iterator[Visit]:
    """Finished cells, one after the other, each with the latents of the one before."""
    for number, node in enumerate(nodes):
        frees = (node,) if number and node not in keeps else ()
        yield Visit(node, epoch, first, last, emit, frees, final=False, frontier=False)


def sequence(
    depth: int, epochs: int, steps: int, classifier_epochs: int = 0, reads: tuple[int, ...] = (), cut: Cut = WHOLE
) -> Iterator[Visit]:
    """Within each range of an epoch, each cell in turn while it emits; the classifier ends it. See ``separate``."""
    for epoch in range(epochs):
        for first, last in cut.steps(steps):
            final = epoch == epochs - 1 and last == steps
            for node in range(depth):
                emits = node in reads or node < depth - 1
                frees = (node,) if node and node - 1 not in reads else ()
                emit: Emission = "training" if emits else "none"
                last_of_range = node == depth - 1 and not classifier_epochs
                yield Visit(node, epoch, first, last, emit, frees, final, last_of_range)
            if classifier_epochs:
                read = tuple(node + 1 for node in reads)
                yield Visit(depth, epoch, first, last, "none", read, final, frontier=True)


def streamed(
    depth: int, epochs: int, steps: int, classifier_epochs: int = 0, reads: tuple[int, ...] = (), cut: Cut = WHOLE
) -> Iterator[Visit]:
    """Every step goes forward through all cells and back: a visit of the last one, whose loss it is, for each epoch."""
    for epoch in range(epochs):
        yield Visit(depth - 1, epoch, 0, steps, "none", (), epoch == epochs - 1, frontier=True)


def frontier_before(visits: Sequence[Visit], number: int) -> int:
    """Where to continue so that a visit finds all that it reads: after the last frontier before it."""
    while number and not visits[number - 1].frontier:
        number -= 1
    return number


SCHEDULES: dict[str, Callable[[int, int, int, int, tuple[int, ...], Cut], Iterator[Visit]]] = {
    "separate": separate,
    "sequence": sequence,
    "streamed": streamed,
}
