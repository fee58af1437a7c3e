"""Untrusted images, arrays and labels are read right, or refused in one line that names the file.

``pytest tests/untrusted/test_fuzzed_data_files.py``; ``EDGETRAIN_EXAMPLES=1000`` tries more.
"""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.made_files import PACKERS, cifar_rows, cycle, idx_images, idx_labels, pixels
from hypothesis import given
from hypothesis import strategies as st
from made_attacks import MIB, NUMBERS, damaged, fuzzing, ours, refused, spliced

from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.data.cifar import CifarFiles, CifarRows, open_cifar
from edgetrain.data.idx import IdxPair, open_idx
from edgetrain.data.npz import open_npz, open_npz_rows
from edgetrain.data.split import stratified
from edgetrain.errors import CorruptError, InputError

Rows = list[tuple[np.ndarray, "np.ndarray | None"]]
suffixes = st.sampled_from(list(PACKERS))


def everything(opener: Callable[[], DataSet], kept: int = 100) -> Callable[[], Rows]:
    """The first chunks of both parts, all of them read and of the shape that the data set says."""

    def read() -> Rows:
        data, found = opener(), []
        for part in filter(None, (data.train, data.test)):
            for values, labels in part.chunks():
                assert values.shape[1:] == data.shape
                assert labels is None or (len(labels) == len(values) and labels.min() >= 0)
                assert labels is None or not data.classes or labels.max() < data.classes
                found.append((values, labels))
                del found[kept:]
        return found

    return read


def same(found: Rows | None, expected: Rows) -> bool:
    return found is not None and all(
        np.array_equal(x, other_x) and np.array_equal(np.asarray(y), np.asarray(other_y))
        for (x, y), (other_x, other_y) in zip(found, expected, strict=True)
    )


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- IDX and CIFAR ------------------------------------------------------------------------------

IMAGES, LABELS = pixels(6, 4, 3), cycle(6, 3)


def opened_idx(folder: Path, images: bytes, labels: bytes, suffix: str, kept: int = 100) -> Callable[[], Rows]:
    pair = IdxPair(put(folder / f"images{suffix}", images), put(folder / f"labels{suffix}", labels))
    return everything(lambda: open_idx("tiny", pair, pair, 3), kept)


@fuzzing(200)
@given(data=st.data(), suffix=suffixes, packed_first=st.booleans())
def test_damaged_idx_files(data: st.DataObject, suffix: str, packed_first: bool, tmp_path: Path) -> None:
    pack = PACKERS[suffix]
    whole = [idx_images(IMAGES), idx_labels(LABELS)]
    if packed_first:
        found = [data.draw(damaged(pack(content))) for content in whole]
    else:
        found = [pack(data.draw(damaged(content))) for content in whole]
    rows = ours(opened_idx(tmp_path, *found, suffix), str(tmp_path))
    if found == [pack(content) for content in whole]:
        assert same(rows, 2 * [(IMAGES[:, None], LABELS)])


@fuzzing(100)
@given(
    sizes=st.lists(st.sampled_from(NUMBERS).map(lambda n: n % (1 << 32)), min_size=3, max_size=3),
    magics=st.tuples(st.sampled_from([0x803, 0x803, 0x801, 0x0D03]), st.sampled_from([0x801, 0x801, 0x803])),
    suffix=suffixes,
)
def test_idx_headers_of_any_size(sizes: list[int], magics: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    images = PACKERS[suffix](struct.pack(">4I", magics[0], *sizes) + b"123")
    labels = PACKERS[suffix](struct.pack(">2I", magics[1], sizes[0]) + b"\0\1\2")
    read = opened_idx(tmp_path, images, labels, suffix)
    rows = ours(read, str(tmp_path))
    assert rows is None or sizes[0] * sizes[1] * sizes[2] == 3


@fuzzing(100)
@given(data=st.data(), suffix=suffixes, label_bytes=st.sampled_from([1, 2]), packed_first=st.booleans())
def test_damaged_cifar_files(
    data: st.DataObject, suffix: str, label_bytes: int, packed_first: bool, tmp_path: Path
) -> None:
    images, pack = pixels(3, 3, 32, 32), PACKERS[suffix]
    whole = cifar_rows(images, LABELS[:3], label_bytes)
    found = data.draw(damaged(pack(whole))) if packed_first else pack(data.draw(damaged(whole)))
    files = CifarFiles([put(tmp_path / f"batch.bin{suffix}", found)], 3)
    opener = everything(lambda: open_cifar("tiny", files, files, CifarRows(label_bytes, 10)))
    rows = ours(opener, str(files.paths[0]))
    if found == pack(whole):
        assert same(rows, 2 * [(images, LABELS[:3])])


# --- NPY and NPZ --------------------------------------------------------------------------------


def npy(header: str, body: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + body


def saved(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as found:
        for name, content in members.items():
            found.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


X, Y = pixels(6, 4), cycle(6, 3)
WHOLE = {"x_train.npy": saved(X), "y_train.npy": saved(Y), "x_test.npy": saved(X), "y_test.npy": saved(Y)}
compressions = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])


@fuzzing(300)
@given(data=st.data(), compression=compressions)
def test_damaged_npz_archives(data: st.DataObject, compression: int, tmp_path: Path) -> None:
    whole = archive(WHOLE, compression)
    found = data.draw(damaged(whole))
    path = put(tmp_path / "some.npz", found)
    rows = ours(everything(lambda: open_npz(path)), str(path))
    ours(everything(lambda: open_npz_rows(path)), str(path))
    if found == whole:
        assert same(rows, 2 * [(X, Y)])


@fuzzing(300)
@given(data=st.data(), compression=compressions)
def test_damaged_arrays_inside_a_sound_archive(data: st.DataObject, compression: int, tmp_path: Path) -> None:
    dtype = data.draw(st.sampled_from(["u1", "f4", ">f8", "f2", "i8", "?"]))
    whole = {"x.npy": saved(pixels(10, 3).astype(dtype)), "y.npy": saved(cycle(10, 2).astype(dtype))}
    members = {name: data.draw(damaged(content)) for name, content in whole.items()}
    path = put(tmp_path / "some.npz", archive(members, compression))
    rows = ours(everything(lambda: open_npz(path)), str(path))
    ours(everything(lambda: open_npz_rows(path)), str(path))
    assert members != whole or rows is not None


LITERALS = [
    *("()", "(2,)", "(2, 2)", "(4,)", "(True, 4)", "(2.0, 2)", "[2, 2]", "(-1, 4)", "4", "None", "True", "False"),
    *("'<f4'", "'|u1'", "'|O'", "'<U9'", "'<f12'", "'f4,f4'", "[('a', '<f4')]", "'>i8'", "'\\ud800'", "b'<f4'"),
    *("0x" + "f" * 5000, "(0x" + "f" * 5000 + ",)", "1e999", "9" * 4400, "-" * 99 + "1", "'" + "O" * 2000 + "'"),
    *("{" * 90, "{1: {}}", "lambda: 0", "__import__('os')", "(" + "1," * 40 + ")", "\0", "'\\N{BELL}'", "1if 1else 0"),
    *(f"({number}, 2)" for number in NUMBERS[::5]),
]


@fuzzing(300)
@given(
    values=st.lists(st.sampled_from(LITERALS), min_size=3, max_size=3),
    usual=st.lists(st.booleans(), min_size=3, max_size=3),
    noise=spliced(["", "", " ", "#", ",", "}", "\n", "\\", "'x': 1"], 2),
    version=st.sampled_from([1, 2, 3]),
    body=st.binary(max_size=40),
)
def test_odd_npy_headers(
    values: list[str], usual: list[bool], noise: str, version: int, body: bytes, tmp_path: Path
) -> None:
    plain = ["'|u1'", "False", "(2, 2)"]
    fields = [right if keep else value for right, keep, value in zip(plain, usual, values, strict=True)]
    header = "{{'descr': {}, 'fortran_order': {}, 'shape': {}{}}}".format(*fields, noise)
    path = put(tmp_path / "some.npz", archive({"x.npy": npy(header, body, version)}))
    rows = ours(everything(lambda: open_npz_rows(path)), str(path))
    if fields == plain and noise in ("", " ", ","):
        assert (rows is not None) == (len(body) == 4)


@fuzzing(100)
@given(names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=4), ending=st.booleans())
def test_members_of_any_name_are_shown_in_one_line(names: list[str], ending: bool, tmp_path: Path) -> None:
    path = put(tmp_path / "some.npz", archive({f"{name}.npy": b"" for name in names} if ending else {}))
    assert ours(lambda: open_npz(path), str(path)) is None


def test_members_that_lead_elsewhere_are_written_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "deeper"
    folder.mkdir(parents=True)
    others = {"../../x.npy": saved(X), "/tmp/edgetrain-slip.npy": saved(X), "..\\x.npy": saved(X)}
    path = put(folder / "some.npz", archive({**others, **WHOLE}))
    assert everything(lambda: open_npz(path))()
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert not Path("/tmp/edgetrain-slip.npy").exists()


# --- labels and splits --------------------------------------------------------------------------

label_values = st.lists(
    st.integers(0, 3)
    | st.floats(width=64)
    | st.sampled_from([-1, 2**31, -(2**63), 2**63 - 1, float("-inf"), float("inf"), -1e300, 0.5]),
    min_size=1,
    max_size=8,
)


@fuzzing(300)
@given(values=label_values, dtype=st.sampled_from(["f2", "f4", "f8", "f16", "i1", "i8", "u8", "?", "U3", "O", "M8[s]"]))
def test_labels_of_any_value_and_dtype(values: list[float], dtype: str) -> None:
    with np.errstate(all="ignore"):
        try:
            labels = np.array(values).astype(dtype)
        except (ValueError, OverflowError, TypeError):
            return
    found = ours(lambda: from_arrays((pixels(len(labels), 2), labels)), "y_train")
    if found is not None:
        assert sorted(set(labels.astype(int).tolist())) == list(range(found.classes))


def test_long_doubles_of_a_file_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "some.npz", archive({"x.npy": saved(X.astype(np.longdouble)), "y.npy": saved(Y)}))
    refused(lambda: open_npz(path), InputError, f"{path}: x: long doubles, .* convert with")


def test_labels_below_all_whole_numbers_are_refused() -> None:
    labels = np.array([-np.longdouble("1e4900"), 0], np.longdouble)
    refused(lambda: from_arrays((pixels(2, 2), labels)), InputError, "labels must be 0..C-1")


@fuzzing(50)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), share=st.integers(0, 59))
def test_a_split_takes_test_rows_and_keeps_each_class_for_training(labels: list[int], share: int) -> None:
    chosen = stratified(np.array(labels), min(share, len(labels) - 1), "some")
    assert chosen.sum() <= share
    assert set(np.array(labels)[~chosen].tolist()) == set(labels)


def test_as_many_classes_as_rows_are_split_in_time() -> None:
    assert not stratified(np.arange(20_000), 4000, "some").any()


# --- bombs --------------------------------------------------------------------------------------


def zeros(pack: Any, size: int) -> bytes:
    """So many zero bytes, packed."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="w") if pack is gzip else lzma.LZMAFile(out, "w") as file:
        for _ in range(size // MIB):
            file.write(bytes(MIB))
    return out.getvalue()


@pytest.mark.parametrize("pack", [gzip, lzma])
def test_a_bomb_of_pixels_costs_a_chunk(pack: Any, tmp_path: Path) -> None:
    suffix = ".gz" if pack is gzip else ".xz"
    head = [struct.pack(">4I", 0x803, 1 << 16, 1 << 10, 1 << 10), struct.pack(">2I", 0x801, 1 << 16)]
    bodies = [zeros(pack, 96 * MIB), pack.compress(bytes(1 << 16))]
    found = [pack.compress(start) + body for start, body in zip(head, bodies, strict=True)]
    refused(opened_idx(tmp_path, *found, suffix, kept=0), CorruptError, "truncated", 32 * MIB)


def test_labels_without_end_are_refused_by_their_header(tmp_path: Path) -> None:
    most = (1 << 32) - 1
    found = [gzip.compress(struct.pack(">4I", 0x803, most, 1, 1)), gzip.compress(struct.pack(">2I", 0x801, most))]
    refused(opened_idx(tmp_path, *found, ".gz"), InputError, f"labels of {most} rows, expected at most")


@pytest.mark.parametrize("sizes", [(1 << 31, 1 << 31, 1 << 31), ((1 << 32) - 1,) * 3, (1, 1 << 16, 1 << 16)])
def test_an_idx_header_of_a_huge_product_is_refused(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    found = struct.pack(">4I", 0x803, *sizes), struct.pack(">2I", 0x801, sizes[0]) + b"\0"
    refused(opened_idx(tmp_path, *found, ""), InputError, str(tmp_path))


def inflated(header: str, size: int) -> bytes:
    """An archive of one array of zeros that takes a thousandth of its size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as found, found.open("x.npy", "w") as member:
        member.write(npy(header))
        for _ in range(size // MIB):
            member.write(bytes(MIB))
    return buffer.getvalue()


def test_a_zip_bomb_costs_a_chunk(tmp_path: Path) -> None:
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (96, 1048576)}"
    path = put(tmp_path / "some.npz", inflated(header, 96 * MIB)[:-200])
    refused(everything(lambda: open_npz_rows(path), 0), CorruptError, str(path), 32 * MIB)
    path = put(tmp_path / "some.npz", inflated(header, 96 * MIB))
    part = open_npz_rows(path).test
    assert part is not None
    assert sum(len(values) for values, _ in part.chunks()) == 96


@pytest.mark.parametrize(
    "shape", ["(1152921504606846976,)", "(1152921504606846976, 1)", "(1099511627776, 1048576)", "(1, 281474976710655)"]
)
def test_an_npy_header_of_2_to_the_60_elements_is_refused(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}"
    path = put(tmp_path / "some.npz", archive({"x.npy": npy(header, b"12345678")}, zipfile.ZIP_DEFLATED))
    refused(lambda: open_npz_rows(path), CorruptError, str(path))


def test_labels_of_an_npz_without_end_are_refused_by_their_header(tmp_path: Path) -> None:
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (268435456, 1)}"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as found:
        for name in ("x.npy", "y.npy"):
            with found.open(name, "w", force_zip64=True) as member:
                member.write(npy(header))
                for _ in range(64):
                    member.write(bytes(4 * MIB))
    path = put(tmp_path / "some.npz", buffer.getvalue())
    refused(lambda: open_npz_rows(path), InputError, "labels of 268435456 rows, expected at most")
