"""Rows held out of the training rows, by which a run makes its choices: never by its test rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.split import stratified
from edgetrain.errors import InputError


def with_validation(data: DataSet, share: float) -> DataSet:
    """The data set with a share of its training rows as validation rows, each class in proportion.

    The draw is always the same for the same labels.

    Args:
        data: has training rows with labels.
        share: of the training rows, above 0 and below 1.

    Raises:
        InputError: a class would have no validation row.
    """
    assert data.train is not None
    labels = np.concatenate([y for _, y in data.train.chunks() if y is not None])
    held_out = stratified(labels, round(share * len(labels)), "validation")
    counts = np.bincount(labels, minlength=data.classes)
    missing = np.flatnonzero(np.bincount(labels[held_out], minlength=data.classes) == 0)
    if len(missing):
        label = int(missing[0])
        raise InputError(
            f"--validation {share:g}: none of the {counts[label]} training rows of class {label} would be a validation"
            " row; use a larger share, or more rows"
        )
    train, validation = (_selected(data.train, keep) for keep in (~held_out, held_out))
    return replace(data, train=train, validation=validation)


def _selected(part: Part, keep: NDArray[np.bool_]) -> Part:
    return replace(part, rows=int(keep.sum()), chunks=partial(_chunks, part, keep))


def _chunks(part: Part, keep: NDArray[np.bool_]) -> Iterator[Chunk]:
    first = 0
    for x, y in part.chunks():
        here = keep[first : first + len(x)]
        first += len(x)
        if here.any():
            yield x[here], None if y is None else y[here]
