"""The Wisconsin diagnostic breast cancer table, out of scikit-learn: 569 rows, 30 columns, 2 classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.data.split import stratified
from edgetrain.errors import InputError

TEST_ROWS = 114


def open_breast_cancer() -> DataSet:
    """The table, split once into 455 training and 114 test rows, stratified.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise InputError(
            "breast-cancer: comes from scikit-learn, which is not installed; pip install 'edgetrain[sklearn]'"
        ) from error
    found = load_breast_cancer()
    inputs, labels = found.data, found.target.astype(np.int64)
    is_test = stratified(labels, TEST_ROWS, "breast-cancer")
    train, test = ((inputs[keep], labels[keep]) for keep in (~is_test, is_test))
    return replace(from_arrays(train, test, "breast-cancer"), names=tuple(map(str, found.target_names)))
