"""A file is written whole or not at all. ``pytest tests/store/test_atomic.py``."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgetrain
from edgetrain.errors import StorageError
from edgetrain.store.atomic import CHUNK, checksum, replacing, write_bytes, write_text

ROOT = Path(edgetrain.__file__).parents[1]


def fail(number: int, *arguments: Any, **named: Any) -> Any:
    raise OSError(number, os.strerror(number))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_content_is_replaced_and_no_temporary_is_left(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "first")
    write_text(tmp_path / "a", "zweiter Ölwert")
    assert (tmp_path / "a").read_bytes() == "zweiter Ölwert".encode()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
def test_a_failure_before_the_rename_changes_nothing(
    step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    owner = os if step == "fsync" else Path
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, lambda *a, **k: fail(number))
        with pytest.raises(StorageError) as caught:
            write_bytes(target, b"new")
    assert str(caught.value).startswith(f"{target}: ")
    assert os.strerror(number).lower() in str(caught.value).lower()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_half_written_temporary_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(StorageError, match="no space left"), replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"ha")
        fail(errno.ENOSPC)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), ValueError("y")])
def test_what_is_no_disk_error_passes_unchanged(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)), replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"ha")
        raise error
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_cannot_be_synced_is_reported_and_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real, calls = tmp_path / "a", os.fsync, []

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            fail(errno.EIO)
        real(descriptor)

    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(StorageError, match="input/output error"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"new"  # the rename has happened: whole, if not known to be durable
    assert names(tmp_path) == ["a"]


def test_the_medium_is_told_in_order_file_then_name_then_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        log.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        log.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_bytes(tmp_path / "a", b"new")
    assert log == ["fsync .a.tmp", "rename a", f"fsync {tmp_path.name}"]


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file or directory"):
        write_bytes(tmp_path / "nowhere" / "a", b"new")


def test_a_writer_killed_at_any_moment_leaves_one_of_its_contents(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgetrain.store.atomic import write_bytes\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1; write_bytes(Path(sys.argv[1]), bytes([i % 256]) * 300_000)\n"
    )
    target = tmp_path / "a"
    for delay in (0.0, 0.013, 0.029):
        target.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", code, str(target)], cwd=ROOT)
        until = time.monotonic() + 20
        while not target.exists() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = target.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_a_checksum_is_the_xxh3_digest_of_the_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    assert checksum(tmp_path / "a") == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_checksum_crosses_the_bounds_of_chunks(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    assert checksum(tmp_path / "a") == xxhash.xxh3_128_hexdigest(content[:size])


def test_the_checksum_of_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone: no such file"):
        checksum(tmp_path / "gone")
