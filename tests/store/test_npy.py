from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from edgetrain.errors import InputError, StorageError
from edgetrain.store.atomic import check_target
from edgetrain.store.npy import writing_npy


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 3), (3, 1), (0, 3), (2, 0)])
def test_rows_written_in_any_order_are_read_back(tmp_path, shape):
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    with writing_npy(tmp_path / "a.npy", shape) as put:
        for first in reversed(range(0, shape[0], 2)):
            put(first, values[first : first + 2])
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)


def refuse(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("operation", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_an_earlier_file_as_it_was(tmp_path, monkeypatch, operation):
    (tmp_path / "a.npy").write_bytes(b"earlier")
    monkeypatch.setattr(os, operation, refuse)
    with pytest.raises(StorageError, match="no space left"), writing_npy(tmp_path / "a.npy", (4, 2)) as put:
        put(0, np.zeros((4, 2), np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert (tmp_path / "a.npy").read_bytes() == b"earlier"


def test_an_error_in_the_body_leaves_an_earlier_file_as_it_was(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"earlier")
    with pytest.raises(ZeroDivisionError), writing_npy(tmp_path / "a.npy", (4, 2)):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_targets_that_cannot_be_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, why in [
        ("missing/a", "does not exist"), ("file/a", "does not exist"), ("", "is a folder"), ("pipe", "regular file"),
        (os.fsdecode(b"a\xff"), "UTF-8"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=why):
            check_target(tmp_path / name)
    check_target(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="read-only"):
        check_target(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
