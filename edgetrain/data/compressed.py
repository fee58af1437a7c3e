"""A file as it is on disk: plain, ``.gz`` or ``.xz``, read as one stream and never whole in memory."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from edgetrain.data.chunks import ByteStream
from edgetrain.errors import CorruptError, InputError
from edgetrain.store.atomic import storage_errors

SUFFIXES = ("", ".gz", ".xz")
_XZ_MEMORY = 128 << 20  # xz -9 needs 65 MiB to unpack; a header may ask for 4 GiB
_READ = 64 << 10


def find(folder: Path, name: str) -> Path | None:
    """The file ``name`` in ``folder``, plain before ``.gz`` before ``.xz``; ``None``: there is none.

    Raises:
        StorageError: the folder may not be read.
    """
    candidates = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    with storage_errors(folder):
        return next((path for path in candidates if path.is_file()), None)


@contextmanager
def open_stream(path: Path) -> Iterator[ByteStream]:
    """The file's content, unpacked on the way, as a readable stream.

    Raises:
        InputError: the file is empty.
        CorruptError: the archive is damaged, now or at any later read inside the ``with``.
        StorageError: the file is missing or unreadable.
    """
    with storage_errors(path):
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        with path.open("rb") as raw, _damage_named(path), _unpacked(raw, path.suffix) as stream:
            yield cast(ByteStream, stream)


def check_plain_size(path: Path, expected: int) -> None:
    """Compare a plain file's size now; a compressed one shows its size only when it is read.

    Raises:
        CorruptError: the file has another size.
    """
    with storage_errors(path):
        found = path.stat().st_size
    if path.suffix not in SUFFIXES[1:] and found != expected:
        word = "truncated" if found < expected else "trailing bytes"
        raise CorruptError(f"{path}: {word}: holds {found} bytes, expected {expected}; replace the file")


def _unpacked(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return io.BufferedReader(_XzReader(raw), _READ)
    return raw


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
        raise CorruptError(f"{path}: damaged archive ({reason}); replace the file") from error


class _XzReader(io.RawIOBase):
    """What ``lzma.LZMAFile`` reads, with a bound on the decoder's memory, which that class lacks."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._ahead = raw, b""
        self._decoder = _decoder()

    def readable(self) -> bool:
        """It only reads."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Unpack into ``buffer``; 0 at the end of the last stream."""
        while not self._decoder.eof or self._next_stream():
            packed = b""
            if self._decoder.needs_input and not (packed := self._take()):
                raise EOFError("ends before the end-of-stream marker")
            if data := self._decoder.decompress(packed, len(buffer)):
                buffer[: len(data)] = data
                return len(data)
        return 0

    def _take(self) -> bytes:
        block, self._ahead = self._ahead or self._raw.read(_READ), b""
        return block

    def _next_stream(self) -> bool:
        """Whether another xz stream follows; begins it. Zero bytes between streams are padding."""
        self._ahead = self._decoder.unused_data.lstrip(b"\0")
        while not self._ahead:
            block = self._raw.read(_READ)
            if not block:
                return False
            self._ahead = block.lstrip(b"\0")
        self._decoder = _decoder()
        return True


def _decoder() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
