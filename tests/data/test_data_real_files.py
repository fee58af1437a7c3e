"""The real files, where EDGETRAIN_DATA says they are: ``EDGETRAIN_DATA=... pytest tests/data``."""

import os

import numpy as np
import pytest

from edgetrain.data.fetch import locate
from edgetrain.data.known import KNOWN
from edgetrain.data.specs import open_data

COUNTS = {
    "mnist": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "fashion-mnist": [6000] * 10,
    "cifar10": [5000] * 10,
}
SHAPES = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
MEANS = {"mnist": 0.1307, "fashion-mnist": 0.2860, "cifar10": 0.4734}


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", pytest.param("cifar10", marks=pytest.mark.slow)])
def test_real_rows_have_the_published_counts_and_means(name):
    if not os.environ.get("EDGETRAIN_DATA") or locate(KNOWN[name]) is None:
        pytest.skip(f"EDGETRAIN_DATA has no {name}")
    data = open_data(name)
    counts, total = np.zeros(10, int), 0.0
    for values, labels in data.train.chunks():
        counts += np.bincount(labels, minlength=10)
        total += values.mean(dtype=np.float64) * len(values) / 255
    assert counts.tolist() == COUNTS[name]
    assert data.shape == SHAPES[name]
    assert abs(total / data.train.rows - MEANS[name]) < 1e-4
    assert data.test.rows == 10_000


@pytest.mark.slow
def test_real_reviews_have_the_published_counts():
    if not os.environ.get("EDGETRAIN_DATA") or locate(KNOWN["imdb"]) is None:
        pytest.skip("EDGETRAIN_DATA has no imdb")
    data = open_data("imdb")
    assert (data.train.rows, data.test.rows, data.vocabulary) == (25_000, 25_000, 20_002)
    counts = np.zeros(2, int)
    for ids, labels in data.train.chunks():
        counts += np.bincount(labels, minlength=2)
        assert (ids[:, 0] > 0).all()  # no review is empty
    assert counts.tolist() == [12_500, 12_500]
