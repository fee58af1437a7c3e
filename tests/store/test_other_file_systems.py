"""File systems without fsync of folders or without fallocate, and file modes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
import xxhash

from edgetrain.errors import StorageError
from edgetrain.store import atomic
from edgetrain.store.atomic import CHUNK, reserve, verify, write_bytes
from edgetrain.store.entries import FileEntry
from edgetrain.store.tensors import move_durably, write_plain, write_tensors

UNSUPPORTED = [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP]


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_folders_need_not_support_fsync(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("failing", ["folder", "file"])
def test_a_medium_that_fails_is_still_an_error(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = errno.EIO if failing == "folder" else errno.EINVAL  # a file's own fsync must work

    def broken(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (failing == "folder"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError):
        write_bytes(tmp_path / "file", b"content")


@pytest.mark.parametrize("code", UNSUPPORTED)
@pytest.mark.parametrize("size", [1, CHUNK, 3 * CHUNK + 5])
def test_space_is_written_where_it_cannot_be_allocated(
    code: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(descriptor: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    pwrite = os.pwrite
    monkeypatch.setattr(atomic.os, "posix_fallocate", refusing)
    monkeypatch.setattr(atomic.os, "pwrite", lambda at, what, offset: pwrite(at, what[: len(what) // 2 + 1], offset))
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), size)  # the system may write less than it is given
    about = (tmp_path / "file").stat()
    assert about.st_size == size
    assert about.st_blocks * 512 >= size


def test_a_full_disk_is_an_error_when_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "posix_fallocate", full)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="No space"):
        reserve(file.fileno(), 10)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "bytes", b"content")
        write_tensors(tmp_path / "tensors", {"w": torch.zeros(3)}, {})
        size = write_plain(tmp_path / "plain", {"w": torch.zeros(3)}, {})
        entry = FileEntry("plain", atomic.checksum(tmp_path / "plain"), size)
        move_durably(tmp_path / "plain", tmp_path / "moved", entry)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("bytes", "tensors", "moved"), 0o666 & ~mask)


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # reading it would take hours
    with pytest.raises(atomic.CorruptError, match="holds 1099511627776 bytes, expected 7"):
        verify(path, "00", 7)


def test_a_file_of_holes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"begin")
        file.truncate(1 << 40)  # reading it would take minutes
        file.seek(1 << 30)
        file.write(b"middle")
    with pytest.raises(atomic.CorruptError, match="sparse file with more than 64 GiB of holes"):
        atomic.checksum(path)
    monkeypatch.setattr(atomic, "_MOST_HOLES", 1 << 20)
    with (tmp_path / "few").open("wb") as file:
        file.truncate(1 << 19)
        file.seek(1 << 21)
        file.write(b"x" * (1 << 20))
    with pytest.raises(atomic.CorruptError, match="holes"):
        atomic.checksum(tmp_path / "few")
    monkeypatch.setattr(atomic, "_MOST_HOLES", 3 << 20)
    assert atomic.checksum(tmp_path / "few") == xxhash.xxh3_128_hexdigest((tmp_path / "few").read_bytes())
