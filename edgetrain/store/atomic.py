"""A file is written whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from edgetrain.errors import CorruptError, InputError, StorageError

CHUNK = 1 << 20
_MOST_HOLES = 64 << 30  # bytes of a sparse file
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # by the file system


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal into a line that names the file.

    Raises:
        StorageError: whenever the body raises ``OSError``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{path}: {reason[:1].lower()}{reason[1:]}") from error


def temporary_of(path: Path) -> Path:
    """Where ``replacing`` writes; a process that is killed may leave it behind."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; when the body succeeds it becomes ``path``, durably.

    Raises:
        StorageError: the disk refused; ``path`` is then as it was before.
    """
    temporary = temporary_of(path)
    with storage_errors(path):
        try:
            temporary.unlink(missing_ok=True)  # it could be a link to somewhere else
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def check_name(path: Path) -> None:
    """Check the name of a file or folder that is to be created.

    Raises:
        InputError: the name cannot be written as UTF-8, and could not be kept in a record.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: the name is not valid UTF-8; choose another") from None


def check_target(path: Path) -> None:
    """Check that a file can be written at ``path``, before the work that yields its content.

    Raises:
        InputError: the name is not valid UTF-8, its folder is missing, or something other than a file has the name.
        StorageError: the folder is read-only.
    """
    check_name(path)
    with storage_errors(path):
        if path.exists() and not path.is_file():
            raise InputError(
                f"{path}: is {'a folder' if path.is_dir() else 'not a regular file'}; expected a file name"
            )
        if not path.parent.is_dir():
            raise InputError(f"{path}: the folder {path.parent} does not exist; create it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StorageError(f"{path}: the folder {path.parent} is read-only")


def missing_folders(path: Path) -> list[Path]:
    """Of a folder and its parents, those that do not exist, the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def reserve(descriptor: int, size: int) -> None:
    """Allocate ``size`` bytes of an open file, so that a full disk is an error now and not a dead process later.

    Raises:
        OSError: the disk refused.
    """
    if size == 0:
        return
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, size)
            return
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    written = 0
    while written < size:
        written += os.pwrite(descriptor, bytes(min(CHUNK, size - written)), written)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, atomically and durably."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace ``path`` by ``content`` in UTF-8, atomically and durably."""
    write_bytes(path, content.encode())


def sync_file(path: Path) -> None:
    """Force what was written to ``path`` onto the medium."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Force renames inside the folder onto the medium, where the file system can do that for a folder."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def verify(path: Path, expected: str, size: int) -> None:
    """Compare a file with what was written: its size, then its checksum.

    Raises:
        StorageError: the file is missing or unreadable.
        CorruptError: it differs, or is something else than a file.
    """
    if path.is_file() and (there := path.stat().st_size) != size:
        raise CorruptError(f"{path}: holds {there} bytes, expected {size}: the file is damaged")
    if (found := checksum(path)) != expected:
        raise CorruptError(f"{path}: checksum {found}, expected {expected}: the file is damaged")


def _holes(descriptor: int) -> int:
    """Bytes of an open file that are not allocated, counted until there are more than ``_MOST_HOLES``."""
    if not hasattr(os, "SEEK_HOLE"):
        return 0
    size, position, holes = os.fstat(descriptor).st_size, 0, 0
    while position < size and holes <= _MOST_HOLES:
        hole = os.lseek(descriptor, position, os.SEEK_HOLE)
        try:
            position = os.lseek(descriptor, hole, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data after it
                raise
            position = size
        holes += position - hole
    os.lseek(descriptor, 0, os.SEEK_SET)
    return holes


def checksum(path: Path) -> str:
    """The XXH3-128 digest of a file in hex, read in chunks of 1 MiB.

    Raises:
        StorageError: the file is missing or unreadable.
        CorruptError: it is something else than a file, or has holes that would take minutes to read.
    """
    if path.exists() and not path.is_file():
        raise CorruptError(f"{path}: is not a regular file")
    digest = xxhash.xxh3_128()
    with storage_errors(path), path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > _MOST_HOLES and _holes(file.fileno()) > _MOST_HOLES:
            raise CorruptError(f"{path}: is a sparse file with more than {_MOST_HOLES >> 30} GiB of holes")
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
