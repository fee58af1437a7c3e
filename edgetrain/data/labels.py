"""What class labels must be: whole numbers 0..C-1 without gaps, one for each row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import InputError

_MOST_ROWS = 1 << 25  # labels are held whole and sorted, some 32 bytes each: no header may ask for any number


def class_labels(labels: NDArray[Any], rows: int, where: str) -> NDArray[np.int64]:
    """Labels [N] or [N, 1] of any whole-number dtype as int64 [N], none of them negative.

    Raises:
        InputError: their count is not ``rows``, or they are not whole numbers from 0 on.
    """
    check_label_dims(labels.shape, rows, where)
    flat = labels.reshape(-1)
    if flat.dtype.kind not in "biuf":
        raise InputError(f"{where}: labels are {flat.dtype}, expected whole numbers 0..C-1; number the classes")
    _check_whole(flat, where)
    if flat.min() < 0:
        raise InputError(f"{where}: labels must be 0..C-1 without gaps; found {_span(flat)}")
    if float(flat.max()) > np.iinfo(np.int32).max:
        raise InputError(f"{where}: labels must be 0..C-1 without gaps; found up to {flat.max()}")
    return flat.astype(np.int64)


def unknown_labels(labels: NDArray[Any]) -> bool:
    """Whether a label says that it is unknown: -1, or NaN."""
    if labels.dtype.kind not in "if":
        return False
    return bool((np.isnan(labels) | (labels == -1)).any() if labels.dtype.kind == "f" else (labels == -1).any())


def check_label_count(rows: int, where: str) -> None:
    """Refuse more labels than are held in memory.

    Raises:
        InputError: there are too many.
    """
    if rows > _MOST_ROWS:
        raise InputError(f"{where}: labels of {rows} rows, expected at most {_MOST_ROWS}; split the data set")


def check_label_dims(dims: tuple[int, ...], rows: int, where: str) -> None:
    """Compare the dims of a label array with the rows they belong to, before it is read.

    Raises:
        InputError: not one label for each row, or too many.
    """
    if len(dims) > 1 and dims[1:] != (1,):
        raise InputError(
            f"{where}: labels have shape {list(dims)}, expected [{rows}] with one class a row; "
            "one-hot labels: take argmax(axis=1)"
        )
    if len(dims) == 0 or dims[0] != rows:
        found = dims[0] if dims else "a single number"
        raise InputError(f"{where}: found {found} labels for {rows} rows, expected one label for each row")
    check_label_count(rows, where)


def count_classes(labels: NDArray[np.int64], where: str) -> int:
    """The number of classes in training labels [N], int64.

    Raises:
        InputError: there is one class only, a class between the least and the greatest label has no row, or they do
            not begin at 0.
    """
    found = np.unique(labels)
    least, greatest = int(found[0]), int(found[-1])
    if len(found) == 1:
        raise InputError(f"{where}: all training rows have label {least}; expected at least two classes")
    if len(found) == greatest + 1:
        return greatest + 1
    rule = f"{where}: labels must be 0..C-1 without gaps; found {_span(found)}"
    if len(found) == greatest - least + 1:
        raise InputError(f"{rule}: subtract {least}")
    absent = int(np.flatnonzero(np.diff(found, prepend=-1) > 1)[0])
    missing = 0 if absent == 0 else int(found[absent - 1]) + 1
    raise InputError(f"{rule} without {missing}: renumber the classes")


def check_range(labels: NDArray[np.int64], classes: int, where: str, first: int = 0) -> None:
    """Compare labels [N], int64, with the classes there are; ``first`` is the row of the first one.

    Raises:
        InputError: a label is not below ``classes``.
    """
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{where}: row {first + row} has label {labels[row]}, expected 0..{classes - 1} "
            f"({classes} classes); remove such rows or add the class to the training rows"
        )


def _check_whole(flat: NDArray[Any], where: str) -> None:
    if flat.dtype.kind != "f":
        return
    broken = np.flatnonzero(flat != np.floor(flat))  # NaN differs from itself
    if len(broken):
        row = int(broken[0])
        raise InputError(
            f"{where}: labels must be whole numbers 0..C-1; row {row} holds {flat[row]} "
            "(only classification is supported)"
        )


def _span(values: NDArray[Any]) -> str:
    return "..".join(str(value).removesuffix(".0") for value in (values.min(), values.max()))
