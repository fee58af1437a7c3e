"""What every reader gives: a data set whose rows come in chunks, as often as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from edgetrain.data.layout import Channels, Input

#: Rows [N, *shape] (uint8 pixels, float32 images, tables and signals in any real dtype, or token ids) and labels [N],
#: int64; ``None``: no labels.
Chunk = tuple[NDArray[Any], "NDArray[Any] | None"]


@dataclass(frozen=True)
class Part:
    """One part (train or test) of a data set.

    Attributes:
        rows: number of samples.
        chunks: starts a fresh pass over all rows, in order; chunks hold a few MiB.
        where: what errors name: a file, or the data set's name.
    """

    rows: int
    chunks: Callable[[], Iterator[Chunk]]
    where: str

    def first(self, rows: int) -> Part:
        """The first rows, or all if there are no more."""
        return replace(self, rows=min(rows, self.rows), chunks=lambda: _first(self.chunks(), min(rows, self.rows)))


def _first(chunks: Iterator[Chunk], rows: int) -> Iterator[Chunk]:
    left = rows
    for x, y in chunks:
        yield x[:left], None if y is None else y[:left]
        left -= len(x)
        if left <= 0:
            return


@dataclass(frozen=True)
class DataSet:
    """A data set as its reader found it; nothing is loaded yet.

    Attributes:
        name: short name for run folders and reports.
        shape: of one sample: ``(channels, height, width)`` for images, ``(channels, length)`` for signals,
            ``(features,)`` for tables, ``(length,)`` for token ids.
        pixel_max: the greatest pixel value if chunks are uint8 (a value is then byte / pixel_max);
            ``None`` for all others.
        input: what rows are; the columns of tables and the channels of signals are scaled, each by itself.
        classes: number of classes; labels are 0..classes-1.
        train: the training rows; ``None`` where the source has rows to predict on only.
        test: the test rows; ``None`` where there are none.
        names: the classes' names, or empty.
        vocabulary: the number of token ids if rows are token ids 0..vocabulary-1, where 0 is padding and 1
            an unknown word (in the user's own rows, what they mean by it); otherwise ``None``.
        channels: where the source has an image's or a signal's channels; ``None`` if it has no such axis.
        validation: rows held out of the training rows, to choose by; ``None``: there are none.
        drawn: whether the test rows were drawn from the same rows as the training rows.
        split: of rows alone that have labels: gives the data set of which the training and test rows are drawn
            from them. Raises ``InputError`` where they do not suit.
        hint: what to state if the source was not meant to be read like this, or empty.
    """

    name: str
    shape: tuple[int, ...]
    pixel_max: float | None
    input: Input
    classes: int
    train: Part | None
    test: Part | None
    names: tuple[str, ...] = ()
    vocabulary: int | None = None
    channels: Channels | None = None
    hint: str = ""
    validation: Part | None = None
    drawn: bool = False
    split: Callable[[], DataSet] | None = None
