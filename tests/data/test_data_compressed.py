"""Plain, gz and xz files read alike; damage is named."""

import contextlib
import gzip
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import PACKERS, damaged, fuzzing, put

from edgetrain.data.compressed import check_plain_size, find, open_stream
from edgetrain.errors import CorruptError, EdgetrainError, InputError, StorageError

CONTENT = bytes(range(256)) * 3000


def read_all(path):
    with open_stream(path) as stream:
        return b"".join(iter(lambda: stream.read(100_000), b""))


@pytest.mark.parametrize("suffix", PACKERS)
def test_content_is_what_was_packed(tmp_path, suffix):
    assert read_all(put(tmp_path / "file", CONTENT, suffix)) == CONTENT


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_streams_one_behind_the_other_are_one_file(tmp_path, suffix):
    pack = PACKERS[suffix]
    path = tmp_path / f"file{suffix}"
    padding = b"\0" * 8
    path.write_bytes(b"".join(pack(CONTENT[i : i + 1000]) + padding for i in range(0, 100_000, 1000)))
    assert read_all(path) == CONTENT[:100_000]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("keep", [1, 5, 100, -1])
def test_truncated_archive_is_corrupt_and_named(tmp_path, suffix, keep):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(PACKERS[suffix](CONTENT)[:keep])
    with pytest.raises(CorruptError, match=f"file{suffix}: damaged archive"):
        read_all(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@fuzzing
@given(data=st.data())
def test_damage_raises_only_our_errors(tmp_path, suffix, data):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data.draw(damaged(PACKERS[suffix](b"some content" * 20), 30)))
    with contextlib.suppress(EdgetrainError):
        read_all(path)


def test_xz_that_asks_for_much_memory_is_refused(tmp_path):
    greedy = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    path = tmp_path / "file.xz"
    path.write_bytes(lzma.compress(b"small", filters=greedy))
    with pytest.raises(CorruptError, match="limit"):
        read_all(path)


def test_empty_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="empty"):
        read_all(put(tmp_path / "file", b""))


def test_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="no such file"):
        read_all(tmp_path / "absent")


def test_find_prefers_plain_then_gz_then_xz(tmp_path):
    assert find(tmp_path, "file") is None
    for suffix in (".xz", ".gz", ""):
        put(tmp_path / "file", b"content", suffix)
        assert find(tmp_path, "file") == tmp_path / f"file{suffix}"


def test_only_plain_files_are_measured(tmp_path):
    check_plain_size(put(tmp_path / "file", b"12345"), 5)
    check_plain_size(put(tmp_path / "file", b"12345", ".gz"), 99)
    with pytest.raises(CorruptError, match="truncated: holds 5 bytes, expected 6"):
        check_plain_size(tmp_path / "file", 6)
    with pytest.raises(CorruptError, match="trailing"):
        check_plain_size(tmp_path / "file", 4)


def test_gzip_with_rubbish_behind_it_is_corrupt(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(b"content") + b"rubbish")
    with pytest.raises(CorruptError):
        read_all(path)
