"""Arrays that are in memory already: numpy arrays, torch tensors, whatever ``np.asarray`` takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import DataSet
from edgetrain.data.chunks import rows_per_chunk
from edgetrain.data.layout import AS_FOUND, Reading
from edgetrain.data.sources import Labelled, rows_alone, train_and_test
from edgetrain.errors import InputError

ARRAYS = "arrays"  # the name of a data set that has no other


def from_arrays(
    train: tuple[Any, Any], test: tuple[Any, Any] | None = None, name: str = ARRAYS, reading: Reading = AS_FOUND
) -> DataSet:
    """The data set of arrays in memory; nothing is copied until it is read, and no split is drawn.

    Args:
        train: inputs [N, ...] and labels [N], by the rules of ``edgetrain.data.layout``.
        test: the same, or ``None``: no test rows.
        name: of the data set.
        reading: what is stated of the inputs.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set.
    """
    return train_and_test(name, _labelled(train, "train"), test and _labelled(test, "test"), reading)


def from_rows(inputs: Any, labels: Any = None, name: str = ARRAYS, reading: Reading = AS_FOUND) -> DataSet:
    """Inputs [N, ...] to predict on, as the test part; labels [N] are optional.

    Raises:
        InputError: dims, dtypes or labels are not those of a data set.
    """
    found = None if labels is None else _as_array(labels, "labels")
    return rows_alone(name, _ArraySource(_as_array(inputs, "inputs"), "inputs"), found, "labels", reading)


@dataclass(frozen=True)
class _ArraySource:
    array: NDArray[Any]
    where: str

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def dims(self) -> tuple[int, ...]:
        return self.array.shape

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Views of the array's rows."""
        row_bytes = prod(self.dims[1:]) * self.dtype.itemsize
        step = rows_per_chunk(row_bytes, self.where)
        for first in range(0, self.dims[0], step):
            yield self.array[first : first + step]


def _labelled(pair: tuple[Any, Any], part: str) -> Labelled:
    inputs, labels = pair
    where_inputs, where_labels = f"x_{part}", f"y_{part}"
    source = _ArraySource(_as_array(inputs, where_inputs), where_inputs)
    return Labelled(source, _as_array(labels, where_labels), where_labels)


def _as_array(given: Any, where: str) -> NDArray[Any]:
    """A numpy array on the host; a view wherever that is possible."""
    try:
        if hasattr(given, "detach"):  # a torch tensor, on any device
            given = given.detach().cpu()
            given = given.float() if "bfloat16" in str(given.dtype) else given
        return np.asarray(given)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{where}: not an array of numbers ({reason}); give a numpy array") from error
