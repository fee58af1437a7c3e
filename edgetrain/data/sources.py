"""From input arrays and their labels, wherever they lie, to a data set: the rules that all formats share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.labels import check_range, class_labels, count_classes, unknown_labels
from edgetrain.data.layout import (
    AS_FOUND,
    MOST_IDS,
    Layout,
    Reading,
    check_channels,
    check_finite,
    check_ids,
    layout_of,
)
from edgetrain.data.split import TEST_SHARE, stratified
from edgetrain.errors import InputError


class Source(Protocol):
    """An input array that gives its rows in blocks, as often as it is asked.

    Attributes:
        where: what errors name.
        dtype: of the array.
        dims: of the array, rows first.
    """

    @property
    def where(self) -> str: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102

    @property
    def dims(self) -> tuple[int, ...]: ...  # noqa: D102

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Raw rows [n, *dims[1:]], in order, a few MiB at a time."""
        ...


@dataclass(frozen=True)
class Labelled:
    """An input array with one label for each row.

    Attributes:
        source: the inputs.
        labels: as found, any dtype, [N] or [N, 1].
        where: what errors about the labels name.
    """

    source: Source
    labels: NDArray[Any]
    where: str


def train_and_test(name: str, train: Labelled, test: Labelled | None, reading: Reading = AS_FOUND) -> DataSet:
    """The data set of training rows and, if there are any, test rows.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set.
    """
    layout, labels = _checked(train, reading)
    classes = count_classes(labels, train.where)
    found = _Rows(train.source, layout, labels)
    if test is None:
        return _data_set(name, classes, found, None)
    test_layout, test_labels = _checked(test, reading)
    _check_alike(layout, test_layout, test.source.where)
    check_range(test_labels, classes, test.where)
    return _data_set(name, classes, found, _Rows(test.source, test_layout, test_labels))


def split_drawn(name: str, whole: Labelled, reading: Reading = AS_FOUND) -> DataSet:
    """The data set of which a fifth of the rows, stratified and always the same, are test rows.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set, or no row can be spared.
    """
    layout, labels = _checked(whole, reading)
    classes = count_classes(labels, whole.where)
    is_test = stratified(labels, round(len(labels) * TEST_SHARE), "drawn")
    if not is_test.any():
        raise InputError(
            f"{whole.source.where}: {len(labels)} rows of {classes} classes are too few to draw test rows "
            "from; give x_train, y_train, x_test, y_test"
        )
    train, test = (_Rows(whole.source, layout, labels, keep) for keep in (~is_test, is_test))
    return replace(_data_set(name, classes, train, test), drawn=True)


def rows_alone(
    name: str,
    source: Source,
    labels: NDArray[Any] | None,
    where_labels: str,
    reading: Reading = AS_FOUND,
    whole: bool = True,
) -> DataSet:
    """Rows to predict on, as the test part; ``classes`` is 0 without labels, else the greatest label + 1.

    Where a label is unknown (-1, or NaN), the rows count as rows without labels.

    ``whole``: whether training rows may be among them.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set.
    """
    layout = layout_of(source.dtype, source.dims, source.where, reading)
    if labels is not None and unknown_labels(labels):
        labels = None
    checked = None if labels is None else class_labels(labels, source.dims[0], where_labels)
    rows = _Rows(source, layout, checked)
    classes = 0 if checked is None else int(checked.max()) + 1
    vocabulary = (reading.vocabulary or rows.ids()) if layout.input == "tokens" else None
    found = _described(name, layout, classes, None, rows.part(vocabulary), vocabulary)
    if labels is None or not whole:
        return found
    return replace(found, split=partial(split_drawn, name, Labelled(source, labels, where_labels), reading))


@dataclass(frozen=True)
class _Rows:
    """Rows of a source with their labels; where ``keep`` [N] is given, only those it marks."""

    source: Source
    layout: Layout
    labels: NDArray[np.int64] | None
    keep: NDArray[np.bool_] | None = None

    def part(self, vocabulary: int | None) -> Part:
        rows = self.source.dims[0] if self.keep is None else int(self.keep.sum())
        return Part(rows, partial(self.chunks, vocabulary), self.source.where)

    def chunks(self, vocabulary: int | None) -> Iterator[Chunk]:
        """Arranged and checked rows."""
        first = 0
        for block in self.source.blocks():
            here = slice(first, first + len(block))
            values = self.layout.arrange(block)
            if vocabulary is None:
                check_finite(values, first, self.source.where)
            else:
                check_ids(values, vocabulary, first, self.source.where)
            first = here.stop
            kept = here if self.keep is None else here.start + np.flatnonzero(self.keep[here])
            if self.keep is not None:
                values = values[self.keep[here]]
            if len(values):
                yield values, None if self.labels is None else self.labels[kept]

    def ids(self) -> int:
        """The number of token ids, 0..greatest, in one pass."""
        return 1 + max(int(values.max()) for values, _ in self.chunks(MOST_IDS))


def _checked(given: Labelled, reading: Reading) -> tuple[Layout, NDArray[np.int64]]:
    source = given.source
    layout = layout_of(source.dtype, source.dims, source.where, reading)
    check_channels(source.dims, source.where, reading)
    return layout, class_labels(given.labels, source.dims[0], given.where)


def _check_alike(train: Layout, test: Layout, where: str) -> None:
    if (test.input, test.shape, test.pixel_max) != (train.input, train.shape, train.pixel_max):
        raise InputError(f"{where}: {_describe(test)}, but the training rows are {_describe(train)}; make them alike")


def _describe(layout: Layout) -> str:
    if layout.input == "image":
        return f"{'float' if layout.pixel_max is None else 'uint8'} images of shape {list(layout.shape)}"
    return f"{layout.input} rows of shape {list(layout.shape)}"


def _data_set(name: str, classes: int, train: _Rows, test: _Rows | None) -> DataSet:
    vocabulary = train.ids() if train.layout.input == "tokens" else None
    parts = train.part(vocabulary), None if test is None else test.part(vocabulary)
    return _described(name, train.layout, classes, *parts, vocabulary)


def _described(
    name: str, layout: Layout, classes: int, train: Part | None, test: Part | None, vocabulary: int | None
) -> DataSet:
    known = name, layout.shape, layout.pixel_max, layout.input, classes, train, test
    return DataSet(*known, vocabulary=vocabulary, channels=layout.channels, hint=layout.hint)
