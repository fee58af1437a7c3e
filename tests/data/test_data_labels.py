"""Labels are whole numbers 0..C-1 without gaps, one a row; splits are stratified and fixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import fuzzing

from edgetrain.data.labels import check_range, class_labels, count_classes
from edgetrain.data.split import stratified
from edgetrain.errors import InputError


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "uint64", "float32", "float64", "bool"])
@pytest.mark.parametrize("dims", [(4,), (4, 1)])
def test_whole_numbers_of_any_dtype_become_int64(dtype, dims):
    found = class_labels(np.array([0, 1, 1, 0], dtype).reshape(dims), 4, "y")
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1, 1, 0]
    assert count_classes(found, "y") == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "found 2 labels for 3 rows"),
        ([[1, 0], [0, 1], [1, 0]], "argmax"),
        ([0, -1, 1], r"0..C-1 without gaps; found -1..1"),
        ([0.0, 0.5, 1.0], "row 1 holds 0.5"),
        ([0.0, 1.0, np.nan], "row 2 holds nan"),
        ([0.0, 1.0, np.inf], "found up to inf"),
        (["a", "b", "c"], "<U1, expected whole numbers"),
        ([0, 1, 2**40], "found up to"),
        (5, "a single number"),
    ],
)
def test_wrong_labels_are_named(labels, message):
    with pytest.raises(InputError, match=message) as caught:
        class_labels(np.array(labels), 3, "file.npz: y")
    assert str(caught.value).startswith("file.npz: y: ")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (range(1, 11), r"labels must be 0..C-1 without gaps; found 1..10: subtract 1"),
        ([0, 1, 3], r"found 0..3 without 2"),
        ([2, 5], r"found 2..5 without 0"),
    ],
)
def test_gaps_are_named(labels, message):
    with pytest.raises(InputError, match=message):
        count_classes(np.array(list(labels), np.int64), "y")


def test_label_beyond_the_classes_names_the_row():
    with pytest.raises(InputError, match=r"row 11 has label 3, expected 0..2"):
        check_range(np.array([0, 3, 4]), 3, "y", first=10)


@fuzzing
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_split_is_stratified_and_repeatable(counts, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    wanted = round(len(labels) / 5)
    chosen = stratified(labels, wanted, "name")
    assert np.array_equal(chosen, stratified(labels, wanted, "name"))
    assert chosen.sum() <= wanted
    assert chosen.sum() == wanted or min(counts) == 1
    taken = np.bincount(labels[chosen], minlength=len(counts))
    assert (taken < counts).all()
    assert (np.abs(taken - np.array(counts) * wanted / len(labels)) <= 1).all()


def test_another_name_draws_another_split():
    labels = np.arange(1000) % 10
    assert not np.array_equal(stratified(labels, 200, "a"), stratified(labels, 200, "b"))
