"""From input arrays and their labels, wherever they lie, to a data set: the rules that all formats share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.labels import check_range, class_labels, count_classes
from edgetrain.data.layout import Layout, check_finite, layout_of
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


def train_and_test(name: str, train: Labelled, test: Labelled | None) -> DataSet:
    """The data set of training rows and, if there are any, test rows.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set.
    """
    layout, labels = _checked(train)
    classes = count_classes(labels, train.where)
    test_part = None
    if test is not None:
        test_layout, test_labels = _checked(test)
        _check_alike(layout, test_layout, test.source.where)
        check_range(test_labels, classes, test.where)
        test_part = _part(test.source, layout, test_labels)
    return _data_set(name, layout, classes, _part(train.source, layout, labels), test_part)


def split_drawn(name: str, whole: Labelled) -> DataSet:
    """The data set of which a fifth of the rows, stratified and always the same, are test rows.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set, or no row can be spared.
    """
    layout, labels = _checked(whole)
    classes = count_classes(labels, whole.where)
    is_test = stratified(labels, round(len(labels) * TEST_SHARE), "drawn")
    if not is_test.any():
        raise InputError(
            f"{whole.source.where}: {len(labels)} rows of {classes} classes are too few to draw test rows "
            "from; give x_train, y_train, x_test, y_test"
        )
    parts = (_part(whole.source, layout, labels, keep) for keep in (~is_test, is_test))
    return _data_set(name, layout, classes, *parts)


def rows_alone(name: str, source: Source, labels: NDArray[Any] | None, where_labels: str) -> DataSet:
    """Rows to predict on, as the test part; ``classes`` is 0 without labels, else the greatest label + 1.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set.
    """
    if labels is None:
        layout = layout_of(source.dtype, source.dims, source.where)
        return _data_set(name, layout, 0, None, _part(source, layout, None))
    layout, checked = _checked(Labelled(source, labels, where_labels))
    return _data_set(name, layout, int(checked.max()) + 1, None, _part(source, layout, checked))


def _checked(given: Labelled) -> tuple[Layout, NDArray[np.int64]]:
    source = given.source
    layout = layout_of(source.dtype, source.dims, source.where)
    return layout, class_labels(given.labels, source.dims[0], given.where)


def _check_alike(train: Layout, test: Layout, where: str) -> None:
    if (test.shape, test.pixel_max) != (train.shape, train.pixel_max):
        raise InputError(f"{where}: {_describe(test)}, but the training rows are {_describe(train)}; make them alike")


def _describe(layout: Layout) -> str:
    return f"{'float' if layout.pixel_max is None else 'uint8'} rows of shape {list(layout.shape)}"


def _data_set(name: str, layout: Layout, classes: int, train: Part | None, test: Part | None) -> DataSet:
    return DataSet(name, layout.shape, layout.pixel_max, layout.table, classes, train, test)


def _part(
    source: Source, layout: Layout, labels: NDArray[np.int64] | None, keep: NDArray[np.bool_] | None = None
) -> Part:
    rows = source.dims[0] if keep is None else int(keep.sum())
    return Part(rows, partial(_chunks, source, layout, labels, keep), source.where)


def _chunks(
    source: Source, layout: Layout, labels: NDArray[np.int64] | None, keep: NDArray[np.bool_] | None
) -> Iterator[Chunk]:
    """Arranged and checked rows; where ``keep`` [N] is given, only those it marks."""
    first = 0
    for block in source.blocks():
        here = slice(first, first + len(block))
        values = layout.arrange(block)
        check_finite(values, first, source.where)
        first = here.stop
        kept = here if keep is None else here.start + np.flatnonzero(keep[here])
        if keep is not None:
            values = values[keep[here]]
        if len(values):
            yield values, None if labels is None else labels[kept]
