"""npz files: rows stream as numpy wrote them; no pickle, no trust in headers."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import cycle, damaged, fuzzing, pixels, rows_of, small_chunks, survives

from edgetrain.data.npz import open_npz, open_npz_rows
from edgetrain.errors import CorruptError, EdgetrainError, InputError

SAVERS = [np.savez, np.savez_compressed]
FOUR = {
    "x_train": pixels(30, 5, 4),
    "y_train": cycle(30, 3),
    "x_test": pixels(12, 5, 4, seed=1),
    "y_test": cycle(12, 3),
}


def saved(tmp_path, saver=np.savez, **arrays):
    path = tmp_path / "some.npz"
    saver(path, **arrays)
    return path


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(header)) + header.encode() + data


def zipped(tmp_path, **members):
    path = tmp_path / "some.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("saver", SAVERS)
def test_rows_are_those_written(tmp_path, monkeypatch, saver):
    with small_chunks(monkeypatch, 130):
        data = open_npz(saved(tmp_path, saver, **FOUR))
        for part, word in ((data.train, "train"), (data.test, "test")):
            x, y = rows_of(part)
            assert np.array_equal(x[:, 0], FOUR[f"x_{word}"])
            assert np.array_equal(y, FOUR[f"y_{word}"])
    assert (data.name, data.shape, data.pixel_max, data.classes) == ("some", (1, 5, 4), 255.0, 3)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i4", ">i8", "<u8", "|b1"])
def test_tables_of_any_number_type_keep_their_values(tmp_path, dtype):
    inputs = abs(np.random.default_rng(0).normal(size=(9, 4)) * 3).astype(dtype)
    data = open_npz(saved(tmp_path, x_train=inputs, y_train=cycle(9, 2)))
    x, _ = rows_of(data.train)
    assert data.input == "table"
    assert data.test is None
    assert x.dtype == inputs.dtype.newbyteorder("=")
    assert np.array_equal(x, inputs)


@pytest.mark.parametrize("saver", SAVERS)
def test_drawn_split_is_stratified_fixed_and_whole(tmp_path, monkeypatch, saver):
    inputs = np.arange(200, dtype=np.float32).reshape(100, 2)
    path = saved(tmp_path, saver, x=inputs, y=cycle(100, 4))
    data = open_npz(path)
    with small_chunks(monkeypatch, 50):
        (x, y), (x_test, y_test) = rows_of(data.train), rows_of(data.test)
    assert (len(x), len(x_test)) == (80, 20)
    assert np.bincount(y_test).tolist() == [5, 5, 5, 5]
    assert sorted(np.concatenate([x, x_test])[:, 0]) == inputs[:, 0].tolist()
    assert np.array_equal(x[:, 0] // 2 % 4, y)
    assert np.array_equal(rows_of(open_npz(path).test)[0], x_test)


def test_row_of_a_bad_value_is_counted_in_the_file(tmp_path):
    inputs = np.zeros((100, 2), np.float32)
    inputs[70, 1] = np.nan
    data = open_npz(saved(tmp_path, x=inputs, y=cycle(100, 4)))
    with pytest.raises(InputError, match=r"some\.npz: x: row 70 holds nan at position 1"):
        rows_of(data.test)


def test_rows_alone_prefer_x_and_need_no_labels(tmp_path):
    data = open_npz_rows(saved(tmp_path, x=FOUR["x_test"]))
    assert (data.train, data.classes) == (None, 0)
    assert rows_of(data.test)[1] is None
    data = open_npz_rows(saved(tmp_path, **FOUR))
    assert data.classes == 3
    assert np.array_equal(rows_of(data.test)[1], FOUR["y_test"])
    with pytest.raises(InputError, match="holds z; expected x or x_test"):
        open_npz_rows(saved(tmp_path, z=FOUR["x_test"]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": pixels(4, 2)}, "holds x_train; expected x_train, y_train"),
        ({**FOUR, "x_test": None}, "x_test"),
        ({"x_train": pixels(4, 2), "y_train": cycle(4, 2), "x_test": pixels(4, 2)}, "only one of"),
        ({"x": pixels(0, 2), "y": cycle(0, 2)}, "empty"),
        ({"x": pixels(4, 2), "y": cycle(3, 2)}, "found 3 labels for 4 rows"),
        ({"x": pixels(2, 2), "y": cycle(2, 2)}, "too few"),
        ({"x": pixels(10, 2), "y": cycle(10, 2) + 1}, r"some.npz: y: .*found 1..2: subtract 1"),
        ({"x": np.array([{}, {}], object), "y": cycle(2, 2)}, "never read"),
        ({"x": np.asfortranarray(pixels(4, 3)), "y": cycle(4, 2)}, "Fortran"),
        ({"x": np.zeros(4, "f4,f4"), "y": cycle(4, 2)}, "plain numbers"),
        ({"x": np.zeros((4, 2), "M8[s]"), "y": cycle(4, 2)}, "plain numbers"),
        ({"x": np.float32(3), "y": cycle(4, 2)}, "shape"),
    ],
)
def test_files_that_are_no_data_set_are_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message) as caught:
        open_npz(saved(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


def test_absent_empty_and_foreign_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_npz(tmp_path / "absent.npz")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(InputError, match="empty"):
        open_npz(tmp_path / "empty.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(CorruptError, match=r"text.npz: damaged .npz archive"):
        open_npz(tmp_path / "text.npz")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"no array at all", "expected an array of numpy"),
        (npy("x" * 9, version=9), "expected an array of numpy"),
        (npy(" " * 20_000), "takes 20000 bytes"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31), "takes 2147483648 bytes"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}"),
            "holds 0 bytes of data, expected 16",
        ),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 2)}"), "shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': 5}"), "shape"),
        (npy("{'descr': '<f4', 'shape': (1, 1)}", b"1234"), "not that of a .npy"),
        (npy("(" * 9000), "cannot be read"),
        (npy("__import__('os').abort()"), "cannot be read"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}", b"x" * 32), "pickle"),
        (b"\x93NUMPY\x01\x00\xff", "ends inside"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, member, message):
    with pytest.raises(EdgetrainError, match=message):
        open_npz(zipped(tmp_path, x=member, y=member))


def test_huge_shape_costs_no_memory(tmp_path):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 40}, {1 << 20})}}"
    path = zipped(tmp_path, x=npy(header), y=npy(header))
    tracemalloc.start()
    with pytest.raises(CorruptError):
        open_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_changed_data_byte_is_found_by_the_archives_checksum(tmp_path):
    path = saved(tmp_path, **FOUR)
    content = bytearray(path.read_bytes())
    content[content.index(FOUR["x_train"].tobytes()) + 50] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="CRC"):
        rows_of(open_npz(path).train)


def test_other_compression_is_refused(tmp_path):
    path = tmp_path / "some.npz"
    buffer = io.BytesIO()
    np.save(buffer, pixels(10, 2))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", buffer.getvalue())
        archive.writestr("y.npy", buffer.getvalue())
    with pytest.raises(InputError, match="neither stored nor deflated"):
        open_npz(path)


@fuzzing
@given(content=st.binary(max_size=300))
def test_random_bytes_raise_only_our_errors(tmp_path, content):
    path = tmp_path / "some.npz"
    path.write_bytes(content)
    survives(lambda: open_npz(path))
    survives(lambda: open_npz_rows(path))


@pytest.mark.parametrize("saver", SAVERS)
@fuzzing
@given(data=st.data())
def test_damaged_archives_raise_only_our_errors(tmp_path, saver, data):
    path = saved(tmp_path, saver, x=pixels(10, 3), y=cycle(10, 2))
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged(content, len(content))))
    survives(lambda: open_npz(path))


@fuzzing
@given(data=st.data())
def test_damaged_headers_raise_only_our_errors(tmp_path, data):
    buffer = io.BytesIO()
    np.save(buffer, pixels(10, 3).astype(data.draw(st.sampled_from(["u1", "f4", "f2"]))))
    inputs = data.draw(damaged(buffer.getvalue(), 100))
    survives(lambda: open_npz_rows(zipped(tmp_path, x=inputs)))


@fuzzing
@given(fields=st.text(alphabet="{}()'<>|fiubOcMm0123456789,: descrfotanhpeTuFls_-\\x", max_size=80))
def test_odd_header_texts_raise_only_our_errors(tmp_path, fields):
    survives(lambda: open_npz_rows(zipped(tmp_path, x=npy(fields, b"1234"))))
