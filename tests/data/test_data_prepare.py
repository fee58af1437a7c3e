"""Prepared rows on disk are the reader's rows, scaled as promised, in bounded memory."""

import subprocess
import sys
import zipfile
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_files import cycle, fuzzing, pixels, small_chunks

from edgetrain.data.arrays import from_arrays, from_rows
from edgetrain.data.base import DataSet, Part
from edgetrain.data.layout import Reading
from edgetrain.data.npz import open_npz
from edgetrain.data.prepare import Statistics, measure_scaling, prepare
from edgetrain.data.text import LENGTH, LabelledText, open_texts
from edgetrain.errors import CorruptError, InputError, StorageError
from edgetrain.training.inputs import pack, unpack


def table(rows=50, features=4, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, features)).astype(np.float32)


def decoded(file):
    out = torch.empty(file.rows, file.format.row_bytes, dtype=torch.uint8)
    file.read(slice(0, file.rows), out)
    return file.format.decode(out).numpy()


def read_back(prepared):
    x = decoded(prepared.x)
    y = None if prepared.y is None else decoded(prepared.y)
    for file in (prepared.x, prepared.y):
        if file is not None:
            file.close()
    return x, y


def part_of(values, labels=None):
    """A part of one chunk, unchecked."""
    return Part(len(values), lambda: iter([(values, labels)]), "made")


def test_pixels_go_down_as_they_are(tmp_path, monkeypatch):
    inputs = pixels(30, 4, 5)
    data = from_arrays((inputs, cycle(30, 3)))
    with small_chunks(monkeypatch, 70):
        prepared = prepare(data, data.train, tmp_path / "new" / "folder", "train")
    assert prepared.written == 30 * 20 + 30 * 8
    assert (tmp_path / "new/folder/train.x.rows").read_bytes() == inputs.tobytes()
    assert (tmp_path / "new/folder/train.y.rows").stat().st_size == 240
    x, y = read_back(prepared)
    assert np.array_equal(x[:, 0], inputs.astype(np.float32) / 255)
    assert np.array_equal(y, cycle(30, 3))


def test_floats_go_down_bit_for_bit(tmp_path, monkeypatch):
    inputs = table(30, 60).reshape(30, 3, 4, 5)
    data = from_arrays((inputs, cycle(30, 3)))
    with small_chunks(monkeypatch, 600):
        x, _ = read_back(prepare(data, data.train, tmp_path, "train"))
    assert np.array_equal(x, inputs)


def texts_of(values, labels=None, vocabulary=9):
    """A data set of token ids."""
    return DataSet("made", values.shape[1:], None, "tokens", 2, part_of(values, labels), None, vocabulary=vocabulary)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_token_ids_go_down_as_they_are(tmp_path, dtype):
    ids = np.arange(30, dtype=dtype).reshape(5, 6) % 9
    data = texts_of(ids, cycle(5, 2))
    prepared = prepare(data, data.train, tmp_path, "train")
    assert prepared.written == 30 * 4 + 5 * 8
    assert (tmp_path / "train.x.rows").read_bytes() == ids.astype("<i4").tobytes()
    x, y = read_back(prepared)
    assert x.dtype == np.int64
    assert np.array_equal(x, ids)
    assert np.array_equal(y, cycle(5, 2))


def test_texts_are_read_back_as_their_reader_gives_them(tmp_path, monkeypatch):
    texts = [LabelledText(part, n % 2, f"a film w{n}") for n in range(20) for part in ("train", "test")]
    data = open_texts("made", lambda: iter(texts), "made", ("negative", "positive"))
    for part in (data.train, data.test):
        expected = np.concatenate([values for values, _ in part.chunks()])
        with small_chunks(monkeypatch, 3 * 4 * LENGTH):
            x, y = read_back(prepare(data, part, tmp_path, "part"))
        assert np.array_equal(x, expected)
        assert np.array_equal(y, cycle(20, 2))


@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_an_id_beyond_the_vocabulary_leaves_no_files(tmp_path, wrong):
    ids = np.ones((5, 6), np.int64)
    ids[3, 4] = wrong
    data = texts_of(ids)
    with pytest.raises(InputError, match=f"made: row 3 holds id {wrong} at position 4, expected 0..8 "):
        prepare(data, data.train, tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_ids_that_are_no_whole_numbers_are_refused(tmp_path):
    data = texts_of(np.ones((5, 6), np.float32))
    with pytest.raises(InputError, match="made: token ids are float32, expected int32 or int64"):
        prepare(data, data.train, tmp_path, "train")


def test_rows_without_labels_make_no_label_file(tmp_path):
    data = from_rows(pixels(5, 3), reading=Reading("image"))
    prepared = prepare(data, data.test, tmp_path, "new")
    assert prepared.y is None
    assert prepared.written == 15
    prepared.x.close()
    assert [path.name for path in tmp_path.iterdir()] == ["new.x.rows"]


def test_prepared_files_can_be_gathered_from(tmp_path):
    inputs = pixels(30, 6)
    data = from_arrays((inputs, cycle(30, 3)), reading=Reading("image"))
    prepared = prepare(data, data.train, tmp_path, "train")
    out = torch.empty(3, 6, dtype=torch.uint8)
    prepared.x.read(np.array([7, 0, 29]), out)
    assert np.array_equal(out.numpy(), inputs[[7, 0, 29]])
    prepared.x.delete()
    prepared.y.delete()


@pytest.mark.parametrize("kind", ["standard", "unit"])
def test_scaled_training_rows_are_as_promised(tmp_path, monkeypatch, kind):
    inputs = table(200) * [1, 1e-3, 1e4, 1] + [0, 5, -1e5, 3]
    inputs[:, 3] = 0.1
    data = from_arrays((inputs, cycle(200, 2)))
    with small_chunks(monkeypatch, 330):
        scaling = measure_scaling(data.train, kind)
        x, _ = read_back(prepare(data, data.train, tmp_path, "train", Statistics(scaling)))
    assert scaling.shift.dtype == scaling.scale.dtype == np.float64
    assert x.dtype == np.float32
    assert scaling.scale[3] == 1
    assert (x[:, 3] == 0).all()
    if kind == "standard":
        assert np.allclose(x[:, :3].mean(axis=0), 0, atol=1e-3)
        assert np.allclose(x[:, :3].std(axis=0), 1, atol=1e-3)
    else:
        assert np.allclose(x[:, :3].min(axis=0), 0, atol=1e-6)
        assert np.allclose(x[:, :3].max(axis=0), 1, atol=1e-6)


def test_standard_scaling_is_that_of_scikit_learn(monkeypatch):
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    inputs = table(500) * 7 + 100
    data = from_arrays((inputs, cycle(500, 2)))
    with small_chunks(monkeypatch, 100):
        ours = measure_scaling(data.train, "standard").apply(inputs)
    assert np.allclose(ours, scaler.fit_transform(inputs.astype(np.float64)), atol=1e-5)


def test_unit_scaling_clips_what_lies_beyond_the_training_rows():
    scaling = measure_scaling(part_of(np.array([[0.0], [10.0]], np.float32)), "unit")
    assert scaling.apply(np.array([[-5.0], [5.0], [20.0]], np.float32)).ravel().tolist() == [0, 0.5, 1]
    scaling = measure_scaling(part_of(np.array([[0.0], [10.0]], np.float32)), "standard")
    assert scaling.apply(np.array([[20.0]], np.float32)).item() == 3


LARGE_MEANS = {
    "milliseconds since 1970": 1.7e12 + np.arange(300.0) * 1000,
    "narrow spread": 1e6 + np.arange(300) * 1e-4,
    "degrees": 48.137 + np.arange(300) * 1e-7,
    "nanoseconds since 1970": 1_700_000_000_000_000_000 + np.arange(300) * 7,
    "beyond int64": np.uint64(2**63 + 2**62) + np.arange(300, dtype=np.uint64),
    "below zero": -(2**62) + np.arange(300),
    "both ends of int64": np.where(np.arange(300) % 3, 2**63 - 1, -(2**63)),
    "huge": 1e300 * (1 + np.arange(300)),
    "range beyond float64": 1.1e306 * (np.arange(300.0) - 150),
    "tiny": 1e-200 * np.arange(300),
    "bits": np.arange(300) % 2 == 0,
    "bytes": np.arange(300).astype(np.uint8),
    "halves": np.arange(300).astype(np.float16),
}


@pytest.mark.parametrize("kind", ["standard", "unit"])
@pytest.mark.parametrize("column", LARGE_MEANS)
def test_scaling_keeps_the_digits_of_a_column(tmp_path, monkeypatch, column, kind):
    values = LARGE_MEANS[column]
    exact = [Fraction(int(v)) if values.dtype.kind in "biu" else Fraction(float(v)) for v in values]
    if kind == "unit":
        least, most = min(exact), max(exact)
        expected = [float((value - least) / (most - least)) for value in exact]
    else:
        mean = sum(exact) / len(exact)
        variance = sum((value - mean) ** 2 for value in exact) / len(exact)
        deviation = (Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt()
        expected = [float(Decimal((v - mean).numerator) / (v - mean).denominator / deviation) for v in exact]
    data = from_arrays((values.reshape(-1, 1), cycle(300, 2)))
    with small_chunks(monkeypatch, 500):
        scaling = unpack(pack(Statistics(measure_scaling(data.train, kind)))).scaling
        x, _ = read_back(prepare(data, data.train, tmp_path, "train", Statistics(scaling)))
    assert np.allclose(x[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "unit"])
@pytest.mark.parametrize("value", [0.1, 1e6, 1.7e12, -48.137])
def test_a_column_that_varies_by_rounding_only_is_constant(value, kind):
    values = np.full((200, 2), value)
    values[::3, 0] = np.nextafter(value, np.inf)
    scaling = measure_scaling(part_of(values), kind)
    assert scaling.scale.tolist() == [1, 1]
    assert np.allclose(scaling.apply(values), 0, atol=1e-3)


def test_whole_numbers_that_differ_by_one_are_no_rounding_noise():
    values = 2**62 + np.arange(200).reshape(-1, 1) % 2
    assert np.ptp(measure_scaling(part_of(values), "standard").apply(values)) == 2


@fuzzing
@given(
    columns=st.lists(
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from(["standard", "unit"]),
)
def test_scaled_values_are_always_finite(columns, kind):
    values = np.array(columns).T
    scaling = measure_scaling(part_of(values), kind)
    scaled = scaling.apply(values)
    beyond = np.full_like(values, np.finfo(values.dtype).max)
    assert np.isfinite(scaled).all()
    assert np.isfinite(scaling.apply(beyond)).all()
    if kind == "unit":
        assert ((scaled >= 0) & (scaled <= 1)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_value_that_is_not_finite_leaves_no_files(tmp_path, value):
    values = table()
    values[33, 1] = value
    data = DataSet("made", (4,), None, "table", 2, part_of(values, cycle(50, 2)), None)
    with pytest.raises(InputError, match="made: row 33 holds"):
        prepare(data, data.train, tmp_path, "train")
    with pytest.raises(InputError, match="made: row 33 holds"):
        measure_scaling(data.train, "unit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("claimed", [49, 51])
def test_wrong_number_of_rows_leaves_no_files(tmp_path, claimed):
    part = Part(claimed, lambda: iter([(table(), cycle(50, 2))]), "made")
    data = DataSet("made", (4,), None, "table", 2, part, None)
    with pytest.raises(CorruptError, match="made: gives"):
        prepare(data, part, tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_damage_found_on_the_way_leaves_no_files(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, x_train=pixels(1000, 40), y_train=cycle(1000, 2))
    content = bytearray(path.read_bytes())
    content[30_000] ^= 1
    path.write_bytes(content)
    data = open_npz(path)
    with pytest.raises(CorruptError):
        prepare(data, data.train, tmp_path / "store", "train")
    assert list((tmp_path / "store").iterdir()) == []


def test_full_disk_is_a_storage_error_and_leaves_no_files(tmp_path, monkeypatch):
    def full(descriptor, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgetrain.store.latents.reserve", full)
    data = from_rows(pixels(5, 3))
    with pytest.raises(StorageError, match="no space left"):
        prepare(data, data.test, tmp_path, "new")
    assert list(tmp_path.iterdir()) == []


MEASURED = """
import resource, sys
from pathlib import Path
from edgetrain.data.prepare import Statistics, measure_scaling, prepare
from edgetrain.data.specs import open_data

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

small, large, store = sys.argv[1:]
def run(path):
    data = open_data(path)
    scaling = measure_scaling(data.train, "standard")
    for part, name in ((data.train, "train"), (data.test, "test")):
        done = prepare(data, part, Path(store), name, Statistics(scaling))
        done.x.delete(), done.y.delete()
run(small)
before = peak()
run(large)
print(peak() - before)
"""


def write_table(path, rows, compression):
    """A table of ``rows`` x 1024 float32 and its labels, written without holding it."""
    block = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    block[:, 512:] = 0
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)}
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(rows // 1024):
                file.write(block.tobytes())
        with archive.open("y.npy", "w") as file:
            np.lib.format.write_array(file, cycle(rows, 10))


@pytest.mark.slow
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_memory_does_not_grow_with_the_data_set(tmp_path, compression):
    write_table(tmp_path / "small.npz", 8 * 1024, compression)
    write_table(tmp_path / "large.npz", 50 * 1024, compression)  # 200 MiB
    names = [str(tmp_path / name) for name in ("small.npz", "large.npz", "store")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *names], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16  # MiB
