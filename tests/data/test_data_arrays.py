"""Arrays in memory: dtype and dims say what they are."""

import numpy as np
import pytest
import torch
from made_files import cycle, pixels, rows_of, small_chunks

from edgetrain.data.arrays import from_arrays, from_rows
from edgetrain.errors import InputError


def floats(*dims, dtype=np.float32):
    return np.random.default_rng(1).normal(size=dims).astype(dtype)


@pytest.mark.parametrize(
    ("inputs", "shape", "read_as", "order"),
    [
        (pixels(10, 7), (7,), "table", None),
        (pixels(10, 4, 6), (1, 4, 6), "image", None),
        (pixels(10, 4, 6, 3), (3, 4, 6), "image", (0, 3, 1, 2)),
        (pixels(10, 4, 6, 1), (1, 4, 6), "image", (0, 3, 1, 2)),
        (pixels(10, 3, 4, 6), (3, 4, 6), "image", None),
        (pixels(10, 5, 4, 6), (5, 4, 6), "image", None),
        (pixels(10, 64, 3, 3), (64, 3, 3), "image", None),
        (pixels(10, 64, 1, 1), (64, 1, 1), "image", None),
        (pixels(10, 9, 8, 4), (4, 9, 8), "image", (0, 3, 1, 2)),
        (pixels(10, 9, 8, 2), (2, 9, 8), "image", (0, 3, 1, 2)),
        (pixels(10, 4, 8, 2), (4, 8, 2), "image", None),
        (floats(10, 4, 6), (1, 4, 6), "image", None),
        (floats(10, 4, 6, 3), (3, 4, 6), "image", (0, 3, 1, 2)),
        (floats(10, 2, 4, 6), (2, 4, 6), "image", None),
        (floats(10, 7), (7,), "table", None),
        (floats(10, 7, dtype=np.float64), (7,), "table", None),
        (floats(10, 7, dtype=np.float16), (7,), "table", None),
        (floats(10, 7).astype(">f4"), (7,), "table", None),
        (pixels(10, 7).astype(np.int32), (7,), "table", None),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else "",
)
def test_dtype_and_dims_say_what_rows_are(monkeypatch, inputs, shape, read_as, order):
    with small_chunks(monkeypatch, 100):
        data = from_arrays((inputs, cycle(10, 2)), (inputs, cycle(10, 2)))
        x, y = rows_of(data.train)
    assert (data.shape, data.input, data.classes) == (shape, read_as, 2)
    assert data.pixel_max == (255.0 if inputs.dtype == np.uint8 and read_as == "image" else None)
    assert x.dtype == (inputs.dtype.newbyteorder("=") if read_as == "table" or inputs.dtype == np.uint8 else np.float32)
    expected = inputs if order is None else inputs.transpose(order)
    assert np.array_equal(x, expected.reshape(10, *shape).astype(x.dtype))
    assert np.array_equal(y, cycle(10, 2))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((0, 4)), "empty"),
        (np.zeros((4, 0)), "empty"),
        (np.zeros(4), r"shape \[4\]"),
        (np.zeros((4, 1, 1, 1, 1)), "shape"),
        (np.zeros((4, 3), object), "dtype object"),
        (np.zeros((4, 3), complex), "dtype complex128"),
        (np.zeros((4, 3, 3), np.int64), "int64 images"),
        (np.full((4, 3), "a"), "dtype <U1"),
        ([[1], [2, 3]], "not an array"),
    ],
)
def test_arrays_that_are_no_rows_are_refused(inputs, message):
    with pytest.raises(InputError, match=message) as caught:
        from_arrays((inputs, np.zeros(4, int)))
    assert "x_train" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "dims", "dtype"),
    [
        (np.nan, (50, 4), np.float64),
        (np.inf, (50, 4), np.float64),
        (-np.inf, (50, 4), np.float64),
        (np.inf, (50, 4), np.float16),
        (1e300, (50, 2, 2), np.float64),  # images are read as float32, tables as they are
    ],
)
def test_value_that_is_not_finite_names_the_row(monkeypatch, value, dims, dtype):
    inputs = floats(*dims, dtype=dtype)
    inputs.reshape(50, 4)[37, 2] = value
    with (
        small_chunks(monkeypatch, 300),
        pytest.raises(InputError, match=r"x_train: row 37 holds .* position 2"),
    ):
        rows_of(from_arrays((inputs, cycle(50, 2))).train)


def test_torch_tensors_are_arrays():
    inputs = torch.randn(6, 3, requires_grad=True)
    x, y = rows_of(from_arrays((inputs, torch.arange(6) % 2)).train)
    assert np.array_equal(x, inputs.detach().numpy())
    assert y.tolist() == [0, 1, 0, 1, 0, 1]
    x, _ = rows_of(from_rows(inputs.to(torch.bfloat16)).test)
    assert np.array_equal(x, inputs.detach().bfloat16().float().numpy())


def test_test_rows_must_be_like_training_rows():
    train = (pixels(4, 3, 3), cycle(4, 2))
    with pytest.raises(InputError, match=r"x_test: uint8 images of shape \[1, 5, 3\], but the training rows are uint8"):
        from_arrays(train, (pixels(4, 5, 3), cycle(4, 2)))
    with pytest.raises(InputError, match="x_test: float images"):
        from_arrays(train, (floats(4, 3, 3), cycle(4, 2)))
    with pytest.raises(InputError, match=r"x_test: table rows of shape \[3\]"):
        from_arrays(train, (floats(4, 3), cycle(4, 2)))
    with pytest.raises(InputError, match=r"y_test: row 2 has label 2, expected 0..1"):
        from_arrays(train, (pixels(4, 3, 3), cycle(4, 3)))


def test_a_table_s_test_rows_may_have_another_dtype():
    data = from_arrays((pixels(4, 3), cycle(4, 2)), (floats(4, 3), cycle(4, 2)))
    assert (data.input, data.test.rows) == ("table", 4)


def test_no_split_is_drawn_from_arrays():
    data = from_arrays((pixels(4, 3), cycle(4, 2)))
    assert data.train.rows == 4
    assert data.test is None


def test_rows_alone_need_no_labels():
    data = from_rows(pixels(4, 3))
    assert (data.train, data.classes, data.test.rows) == (None, 0, 4)
    assert rows_of(data.test)[1] is None
    labelled = from_rows(pixels(4, 3), [3, 1, 1, 0])
    assert labelled.classes == 4
    assert rows_of(labelled.test)[1].tolist() == [3, 1, 1, 0]
