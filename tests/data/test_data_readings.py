"""What the user states of their rows is what they are read as; what cannot be meant is refused."""

import numpy as np
import pytest
from made_files import cycle, pixels, rows_of, small_chunks

from edgetrain.data.arrays import from_arrays, from_rows
from edgetrain.data.layout import Reading
from edgetrain.data.npz import open_npz, open_npz_rows
from edgetrain.data.prepare import measure_scaling
from edgetrain.data.specs import NAMES, open_data, open_rows
from edgetrain.errors import InputError
from edgetrain.training.inputs import describe


def floats(*dims, dtype=np.float32):
    return np.random.default_rng(1).normal(size=dims).astype(dtype)


def ids(*dims, most=7, dtype=np.int64):
    return np.random.default_rng(2).integers(0, most, dims).astype(dtype)


@pytest.mark.parametrize(
    ("inputs", "reading", "shape", "order"),
    [
        (pixels(10, 64), Reading("image"), (64,), None),
        (floats(10, 64), Reading("image"), (64,), None),
        (floats(10, 6), Reading("table"), (6,), None),
        (floats(10, 5, 7, 3), Reading(channels="first"), (5, 7, 3), None),
        (pixels(10, 5, 3, 3), Reading("image", "last"), (3, 5, 3), (0, 3, 1, 2)),
        (pixels(10, 8, 8, 9), Reading(channels="last"), (9, 8, 8), (0, 3, 1, 2)),
        (floats(10, 6), Reading("signal"), (1, 6), None),
        (pixels(10, 6), Reading("signal"), (1, 6), None),
        (ids(10, 6), Reading("signal"), (1, 6), None),
        (floats(10, 2, 6), Reading("signal"), (2, 6), None),
        (floats(10, 6, 2), Reading("signal"), (6, 2), None),
        (floats(10, 6, 2), Reading("signal", "last"), (2, 6), (0, 2, 1)),
        (ids(10, 2, 6, dtype=np.int16), Reading("signal", "first"), (2, 6), None),
        *((ids(10, 6, dtype=kind), Reading("tokens"), (6,), None) for kind in ("u1", "i1", "<i4", ">i8", "u8")),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else "",
)
def test_rows_are_read_as_stated(tmp_path, monkeypatch, inputs, reading, shape, order):
    np.savez(tmp_path / "some.npz", x_train=inputs, y_train=cycle(10, 2), x=inputs)
    with small_chunks(monkeypatch, 100):
        sets = from_arrays((inputs, cycle(10, 2)), reading=reading), open_npz(tmp_path / "some.npz", reading)
        alone = from_rows(inputs, reading=reading), open_npz_rows(tmp_path / "some.npz", reading)
        for data, part in [*((data, data.train) for data in sets), *((data, data.test) for data in alone)]:
            assert data.shape == shape
            assert data.input == (reading.input or "image")
            expected = inputs if order is None else inputs.transpose(order)
            assert np.array_equal(rows_of(part)[0], expected.reshape(10, *shape))


@pytest.mark.parametrize(
    ("inputs", "reading", "message"),
    [
        (floats(4, 3), Reading("tokens"), "float32 values, expected integers as token ids"),
        (floats(4, 3) > 0, Reading("tokens"), "bool values, expected integers"),
        (ids(4, 3, 2), Reading("tokens"), r"shape \[4, 3, 2\], expected \[N, L\] for token ids"),
        (floats(4, 3, 2), Reading("table"), r"shape \[4, 3, 2\], expected \[N, F\] for tables"),
        (pixels(4, 3, 2, 2), Reading("table"), r"expected \[N, F\] for tables"),
        (floats(4, 3, 2, 2), Reading("signal"), r"expected \[N, L\] or \[N, C, L\] or \[N, L, C\] for signals"),
        (ids(4, 3), Reading("image"), "int64 images, expected uint8"),
        (floats(4, 3), Reading(channels="last"), "--channels last: tables of shape .* have no axis of channels"),
        (floats(4, 3), Reading("table", "first"), "tables of shape .* have no axis of channels"),
        (ids(4, 3), Reading("tokens", "first"), "token ids of shape .* have no axis of channels"),
        (pixels(4, 3, 3), Reading(channels="last"), "images of shape .* have no axis of channels"),
        (pixels(4, 64), Reading("image", "last"), "images of shape .* have no axis of channels"),
        (floats(4, 3), Reading("signal", "last"), "signals of shape .* have no axis of channels"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, inputs, reading, message):
    np.savez(tmp_path / "some.npz", x=inputs, y=cycle(4, 2))
    for opened in (
        lambda: from_arrays((inputs, cycle(4, 2)), reading=reading),
        lambda: open_npz(tmp_path / "some.npz", reading),
    ):
        with pytest.raises(InputError, match=message) as caught:
            opened()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reading", [Reading("image"), Reading(channels="first")])
def test_known_sets_have_their_own_reading(name, reading):
    with pytest.raises(InputError, match=f"is for your own data; edgetrain knows how {name} is to be read"):
        open_data(name, reading)


def test_a_run_s_reading_does_not_hinder_known_sets():
    assert open_rows("digits", Reading("table")).input == "image"


# -- token ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31, 2**40])
def test_an_id_that_cannot_be_one_names_the_row(monkeypatch, wrong):
    found = ids(50, 4)
    found[37, 2] = wrong
    with small_chunks(monkeypatch, 200), pytest.raises(InputError, match=f"x_train: row 37 holds id {wrong} at pos"):
        from_arrays((found, cycle(50, 2)), reading=Reading("tokens"))


def test_the_vocabulary_is_that_of_the_training_rows(tmp_path):
    train, test = ids(40, 4), ids(20, 4)
    test[13, 1] = 9
    data = from_arrays((train, cycle(40, 2)), (test, cycle(20, 2)), reading=Reading("tokens"))
    assert data.vocabulary == 7
    with pytest.raises(InputError, match="x_test: row 13 holds id 9 at position 1, expected 0..6"):
        rows_of(data.test)
    with pytest.raises(InputError, match="inputs: row 13 holds id 9"):
        rows_of(from_rows(test, reading=Reading("tokens", vocabulary=7)).test)


def test_a_test_row_of_a_drawn_split_is_named_by_its_row_in_the_file(tmp_path):
    found = ids(50, 4)
    np.savez(tmp_path / "some.npz", x=found, y=cycle(50, 2))
    x_test, _ = rows_of(open_npz(tmp_path / "some.npz", Reading("tokens")).test)
    row = next(number for number, values in enumerate(found) if (values == x_test[3]).all())
    found[row, 1] = 9
    np.savez(tmp_path / "some.npz", x=found, y=cycle(50, 2))
    with pytest.raises(InputError, match=f"x: row {row} holds id 9 at position 1, expected 0..6"):
        rows_of(open_npz(tmp_path / "some.npz", Reading("tokens")).test)


# -- signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("kind", ["standard", "unit"])
def test_channels_of_signals_are_scaled_over_rows_and_positions(monkeypatch, dtype, kind):
    inputs = (abs(floats(30, 2, 9)) * np.array([[[30], [7]]]) + np.array([[[5], [100]]])).astype(dtype)
    data = from_arrays((inputs, cycle(30, 2)), reading=Reading("signal"))
    with small_chunks(monkeypatch, 500):
        scaling = measure_scaling(data.train, kind)
    found, exact = scaling.apply(inputs), inputs.astype(float)
    over = {"axis": (0, 2), "keepdims": True}
    shift, spread = (
        (exact.min(**over), np.ptp(exact, **over)) if kind == "unit" else (exact.mean(**over), exact.std(**over))
    )
    assert np.allclose(found, (exact - shift) / spread, atol=1e-5)


# -- the line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "reading", "nonnegative", "line"),
    [
        (pixels(800, 8, 8, 3), Reading(), False, "800 images, 3x8x8, 0..255 scaled to 0..1, channels last"),
        (pixels(800, 3, 8, 8), Reading(), False, "800 images, 3x8x8, 0..255 scaled to 0..1, channels first"),
        (pixels(800, 8, 8), Reading(), False, "800 images, 1x8x8, 0..255 scaled to 0..1"),
        (floats(1200, 2, 2), Reading(), False, "1,200 images, 1x2x2, values as they are"),
        (floats(1200, 2, 2), Reading(), True, "1,200 images, 1x2x2, values scaled to 0..1 unless they are within it"),
        (pixels(80, 64), Reading("image"), False, "80 images, 64, 0..255 scaled to 0..1"),
        (
            pixels(80, 64),
            Reading(),
            False,
            "80 rows of a table, 64 columns, each standardised; state --input image if these are pixels",
        ),
        (pixels(80, 63), Reading(), False, "80 rows of a table, 63 columns, each standardised"),
        (pixels(80, 64), Reading("table"), False, "80 rows of a table, 64 columns, each standardised"),
        (floats(80, 4), Reading(), True, "80 rows of a table, 4 columns, each scaled to 0..1"),
        (
            ids(80, 4),
            Reading(),
            False,
            "80 rows of a table, 4 columns, each standardised; state --input tokens if these are token ids",
        ),
        (ids(80, 4), Reading("tokens"), False, "80 rows of 4 token ids, 0..6"),
        (
            floats(80, 9, 2),
            Reading("signal", "last"),
            False,
            "80 signals, 2x9, each channel standardised, channels last",
        ),
        (floats(80, 9), Reading("signal"), True, "80 signals, 1x9, each channel scaled to 0..1"),
    ],
)
def test_a_line_says_how_rows_were_read(inputs, reading, nonnegative, line):
    assert describe(from_arrays((inputs, cycle(len(inputs), 2)), reading=reading), nonnegative) == line


def test_known_sets_say_how_they_are_read():
    assert describe(open_data("digits"), False) == "1,437 images, 1x8x8, 0..16 scaled to 0..1"
