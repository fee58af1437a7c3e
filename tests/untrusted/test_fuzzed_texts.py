"""Untrusted reviews, tables of texts and tar archives are read right, or refused in one line that names the file.

``pytest tests/untrusted/test_fuzzed_texts.py``; ``EDGETRAIN_EXAMPLES=1000`` tries more.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from data.made_files import PACKERS
from data.made_reviews import REVIEWS, archive, member, review_members, table
from hypothesis import given
from hypothesis import strategies as st
from made_attacks import MIB, NUMBERS, damaged, fuzzing, ours, refused, spliced

from edgetrain.data.imdb import LABELS, archive_texts, open_imdb
from edgetrain.data.text_csv import csv_texts
from edgetrain.data.transfer import RemoteError, download_blocks
from edgetrain.data.unpack import unpack
from edgetrain.errors import CorruptError, InputError

TEXTS = [(part, LABELS[label], text) for part, label, text in REVIEWS]
suffixes = st.sampled_from(list(PACKERS))
layouts = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def put(path: Path, content: bytes, suffix: str = "") -> Path:
    target = path.with_name(path.name + suffix)
    target.write_bytes(PACKERS[suffix](content))
    return target


def texts_of(path: Path) -> Callable[[], list[tuple[str, int, str]]]:
    return lambda: [tuple(found) for found in archive_texts(path)]


def rows_of(path: Path) -> Callable[[], list[tuple[int, ...]]]:
    """Everything that is read of reviews, the shape of each chunk."""

    def read() -> list[tuple[int, ...]]:
        data = open_imdb("imdb", path, ("negative", "positive"))
        return [values.shape for part in (data.train, data.test) if part for values, _ in part.chunks()]

    return read


# --- CSV ----------------------------------------------------------------------------------------

CSV = [
    *("text", "label", "split", "train", "test", "pos", "neg", ",", ",", "\n", "\r\n", "\r", '"', '""', "\0", " "),
    *("\ufeff", "\u2028", "\x85", "\x1b[2J", "\ud800", "é" * 9, "x" * 5000, "<br", "<br />", ";", "\t", "'"),
]
HEADER = "text,label,split\n"


@fuzzing(200)
@given(text=spliced(CSV, 20), has_header=st.booleans(), suffix=suffixes)
def test_tables_of_odd_pieces(text: str, has_header: bool, suffix: str, tmp_path: Path) -> None:
    content = (HEADER * has_header + text).encode("utf-8", "surrogatepass")
    path = put(tmp_path / "imdb.csv", content, suffix)
    ours(rows_of(path), str(path))
    found = ours(lambda: list(csv_texts(path, LABELS)), str(path))
    assert not found or all(part in ("train", "test") and label in (0, 1) for part, label, _ in found)


@fuzzing(200)
@given(data=st.data(), suffix=suffixes, packed_first=st.booleans())
def test_damaged_tables(data: st.DataObject, suffix: str, packed_first: bool, tmp_path: Path) -> None:
    whole, pack = table(), PACKERS[suffix]
    found = data.draw(damaged(pack(whole))) if packed_first else pack(data.draw(damaged(whole)))
    path = tmp_path / f"imdb.csv{suffix}"
    path.write_bytes(found)
    rows = ours(lambda: [tuple(row) for row in csv_texts(path, LABELS)], str(path))
    if found == pack(whole):
        assert rows == TEXTS


# --- tar ----------------------------------------------------------------------------------------


@fuzzing(300)
@given(data=st.data(), layout=layouts, suffix=suffixes, packed_first=st.booleans())
def test_damaged_archives_of_reviews(
    data: st.DataObject, layout: int, suffix: str, packed_first: bool, tmp_path: Path
) -> None:
    whole, pack = archive(review_members(), layout), PACKERS[suffix]
    found = data.draw(damaged(pack(whole))) if packed_first else pack(data.draw(damaged(whole)))
    path = tmp_path / f"aclImdb_v1.tar{suffix}"
    path.write_bytes(found)
    texts = ours(texts_of(path), str(path))
    if found == pack(whole):
        assert texts == TEXTS
        assert rows_of(path)() == [(3, 256), (2, 256)]


NAMES = [
    "aclImdb/train/pos/1.txt",
    "../../x.txt",
    "/tmp/edgetrain-slip",
    "n" * 150,
    "a\nb",
    "\x1b",
    "x/",
    "",
    "batch.bin",
]
KINDS = [bytes([kind]) for kind in b"0\0001234567SLKxgXAV\xff"]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A tar header of any type and size whose checksum is right, and some blocks behind it."""
    entry = tarfile.TarInfo(draw(st.sampled_from(NAMES)))
    entry.type = draw(st.sampled_from(KINDS))
    entry.linkname = draw(st.sampled_from(NAMES))
    content = draw(st.sampled_from(PAX)) if entry.type in b"xgX" else draw(st.binary(max_size=40))
    entry.size = draw(st.sampled_from([len(content), len(content), *NUMBERS[::3]]))
    return entry.tobuf(tarfile.GNU_FORMAT, errors="replace")[-512:] + content.ljust(
        -(-len(content) // 512) * 512, b"\0"
    )


def pax(key: str, value: str) -> bytes:
    """A record of an extended header."""
    length = len(key.encode()) + len(value.encode()) + 3
    return f"{length + len(str(length + len(str(length))))} {key}={value}\n".encode()


PAX = [
    *(pax("size", value) for value in ("-1", "5", str(1 << 60), "9" * 5000, "x", "")),
    *(pax(key, "9" * 400) for key in ("mtime", "uid", "gid", "path", "linkpath")),
    *(pax("mtime", value) for value in ("nan", "inf", "-1e999")),
    pax("GNU.sparse.map", "0,1,2"),
    pax("GNU.sparse.map", "x"),
    pax("GNU.sparse.size", "9" * 5000),
    pax("GNU.sparse.realsize", "x"),
    pax("GNU.sparse.major", "1") + pax("GNU.sparse.minor", "0"),
    pax("hdrcharset", "BINARY") + pax("path", "x"),
    pax("path", "../../y"),
    b"0 x=y\n",
    b"99999999999999999999 x=y\n",
    b"9" * 5000 + b" x=y\n",
    b"\xff",
    b"",
]


@fuzzing(300)
@given(blocks=st.lists(headers(), max_size=4), suffix=suffixes, whole_first=st.booleans())
def test_archives_of_odd_members(blocks: list[bytes], suffix: str, whole_first: bool, tmp_path: Path) -> None:
    reviews, odd = archive(review_members()), b"".join(blocks)
    path = put(tmp_path / "a.tar", odd + reviews if whole_first else odd + bytes(1024), suffix)
    texts = ours(texts_of(path), str(path))
    assert blocks or not whole_first or texts == TEXTS
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    ours(lambda: unpack(path, {"x.txt": 5, "batch.bin": 5}, out), str(path))
    assert all(found.is_file() and not found.is_symlink() for found in out.iterdir())
    assert {found.name for found in out.iterdir()} <= {"x.txt", "batch.bin"}
    assert {found.name for found in tmp_path.iterdir()} <= {"out", "a.tar", "a.tar.gz", "a.tar.xz"}


@fuzzing(200)
@given(data=st.data(), layout=layouts, suffix=suffixes)
def test_damaged_archives_of_known_files(data: st.DataObject, layout: int, suffix: str, tmp_path: Path) -> None:
    entries = [member("folder/batch.bin", b"12345"), member("n" * 90 + "/x.txt", b"text!"), member("more", b"?")]
    whole = archive(entries, layout)
    content = data.draw(damaged(whole))
    path = put(tmp_path / "a.tar", content, suffix)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    for found in out.iterdir():
        found.unlink()
    ours(lambda: unpack(path, {"x.txt": 5, "batch.bin": 5}, out), str(path))
    found_files = {found.name: found.read_bytes() for found in out.iterdir()}
    assert all(len(found) == 5 for found in found_files.values())
    if content == whole:
        assert found_files == {"x.txt": b"text!", "batch.bin": b"12345"}


EVIL = [
    member("../batch.bin", b"12345"),
    member("/tmp/edgetrain-slip/batch.bin", b"12345"),
    member("a/../../batch.bin", b"12345"),
]
ODD = [
    member("batch.bin", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member("batch.bin", type=tarfile.LNKTYPE, linkname="x.txt"),
    member("batch.bin", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    member("batch.bin", type=tarfile.BLKTYPE),
    member("batch.bin", type=tarfile.FIFOTYPE),
    member("batch.bin", type=tarfile.DIRTYPE),
]


@pytest.mark.parametrize("number", range(len(EVIL)))
def test_a_member_that_leads_elsewhere_is_written_where_it_belongs(number: int, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    unpack(put(out.parent / "a.tar", archive([EVIL[number]]), ".gz"), {"batch.bin": 5}, out)
    files = sorted(found for found in tmp_path.rglob("*") if not found.is_dir())
    assert files == [out.parent / "a.tar.gz", out / "batch.bin"]
    assert not Path("/tmp/edgetrain-slip").exists()


@pytest.mark.parametrize("number", range(len(ODD)))
def test_a_link_or_a_device_is_never_made(number: int, tmp_path: Path) -> None:
    path = put(tmp_path / "a.tar", archive([ODD[number], member("x.txt", b"text!")]))
    out = tmp_path / "out"
    out.mkdir()
    refused(lambda: unpack(path, {"batch.bin": 5, "x.txt": 5}, out), CorruptError, "lacks batch.bin")
    assert [found.name for found in out.iterdir()] == ["x.txt"]


# --- bombs --------------------------------------------------------------------------------------


def packed(head: bytes, block: bytes, times: int) -> bytes:
    """``head`` and ``blocks`` blocks of a MiB, as gzip."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="w", compresslevel=1) as file:
        file.write(head)
        for _ in range(times):
            file.write((block * (MIB // len(block) + 1))[:MIB])
    return out.getvalue()


def test_a_row_without_end_costs_a_row(tmp_path: Path) -> None:
    for block in (b"x", b'"', b",", b"\0"):
        path = tmp_path / "imdb.csv.gz"
        path.write_bytes(packed(HEADER.encode(), block, 48))
        refused(rows_of(path), InputError, "more than 1048576 bytes", 16 * MIB)


def test_a_member_without_end_costs_a_block(tmp_path: Path) -> None:
    entry, _ = member("aclImdb/train/unsup/0_0.txt")
    entry.size = 1 << 30
    path = tmp_path / "a.tar.gz"
    path.write_bytes(packed(entry.tobuf(tarfile.GNU_FORMAT), b"\0", 48))
    refused(rows_of(path), CorruptError, "damaged archive", 8 * MIB)


def sparse(kind: str) -> tuple[bytes, bytes]:
    """A header and the block of which a sparse file's map goes on for ever."""
    entry, _ = member("x")
    if kind == "pax":
        records = pax("GNU.sparse.major", "1") + pax("GNU.sparse.minor", "0")
        extension = tarfile.TarInfo("pax")
        extension.type, extension.size = tarfile.XHDTYPE, len(records)
        entry.size = 1 << 29
        head = extension.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + entry.tobuf(tarfile.USTAR_FORMAT)
        return head + b"999999999\n".ljust(512, b"0"), b"1\n1\n"
    entry.type = tarfile.GNUTYPE_SPARSE
    found = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    found[482] = 1  # more blocks of the map follow
    found[148:156] = b"        "
    found[148:156] = f"{sum(found):06o}\0 ".encode()
    return bytes(found), (b"00000000001\0" * 42)[:504] + b"\1" + bytes(7)


@pytest.mark.parametrize("kind", ["pax", "old"])
def test_a_sparse_map_without_end_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(packed(*sparse(kind), 16))
    refused(rows_of(path), CorruptError, "sparse", 8 * MIB)


def test_descriptions_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        entry, _ = member("x", type=kind)
        path.write_bytes(packed(b"", entry.tobuf(tarfile.GNU_FORMAT), 4))
        refused(rows_of(path), CorruptError, "damaged archive", 16 * MIB)


def test_descriptions_of_all_members_are_not_kept(tmp_path: Path) -> None:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="w", compresslevel=1) as file:
        for number in range(300):
            records = pax(f"k{number}", "v" * 50_000)
            extension = tarfile.TarInfo("pax")
            extension.type, extension.size = tarfile.XGLTYPE, len(records)
            file.write(extension.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0"))
            file.write(member("x")[0].tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(out.getvalue())
    refused(rows_of(path), InputError, "holds no training texts", 4 * MIB)


def test_an_xz_header_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    whole = bytearray(PACKERS[".xz"](table()))
    at = whole.index(b"\x21\x01")  # the filter's id and the size of its one byte: the dictionary
    whole[at + 2] = 40  # 4 GiB - 1
    whole[at + 6 : at + 10] = struct.pack("<I", zlib.crc32(whole[12 : at + 6]))
    path = tmp_path / "imdb.csv.xz"
    path.write_bytes(whole)
    refused(rows_of(path), CorruptError, "Memory usage limit")


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x", "٣", str(1 << 62), ""])
def test_a_server_may_announce_any_length(length: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response(io.BytesIO):
        headers = {"Content-Length": length}  # noqa: RUF012

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(b"content"))
    try:
        assert list(download_blocks("http://x/y")) == [b"content"]
    except RemoteError as error:
        assert "ended after 7 of" in str(error)
