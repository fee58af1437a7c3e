"""Untrusted tar archives: read as a stream, never unpacked, refused if malformed."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from edgetrain.data.compressed import open_stream
from edgetrain.errors import CorruptError

_EXTENSIONS = frozenset("xgXLK")  # types of blocks that describe the next member, which tarfile reads whole
_MAX_EXTENSION = 64 << 10
_MAX_MEMBER = 1 << 30  # tarfile would step block by block over whatever a damaged header claims
_READ = 1 << 20


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """The archive, plain, ``.gz`` or ``.xz``, for ``members`` and ``content``.

    Raises:
        InputError: the file is empty.
        CorruptError: the archive is damaged, now or at any later read inside the ``with``.
        StorageError: the archive is unreadable.
    """
    with open_stream(path) as stream:
        with _damage_named(path), _opened(cast(IO[bytes], stream)) as tar:
            yield tar
        while stream.read(_READ):  # up to the end, where the checksum of the compression is
            pass


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in the archive's order; none is kept once the next is asked for."""
    while (member := tar.next()) is not None:
        if not 0 <= member.size <= _MAX_MEMBER:  # an extension may have changed it
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        yield member
        kept = cast(Any, tar)  # tarfile keeps all that it has seen: 100 MB for the reviews of IMDB
        kept.members.clear()
        kept.pax_headers.clear()


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes] | None:
    """The bytes of a member as a stream; ``None`` for anything but a regular file: links, devices, folders."""
    return tar.extractfile(member) if member.isreg() and not member.issparse() else None


class _Member(tarfile.TarInfo):
    """A header that is refused where tarfile would take damage for the archive's end, or read without bound."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the end mark
            raise tarfile.ReadError(str(error)) from error
        most = _MAX_EXTENSION if member.type.decode("latin-1") in _EXTENSIONS else _MAX_MEMBER
        if not 0 <= member.size <= most:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member

    def _refuse_sparse(self, *arguments: object) -> NoReturn:
        """Their maps have any length, and tarfile takes them whole into memory."""
        raise tarfile.ReadError("a sparse file")

    _proc_sparse = _proc_gnusparse_10 = _refuse_sparse


def _opened(stream: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Name the file in whatever a damaged archive makes tarfile raise.

    The last four stand for fields that are no numbers or out of range, and for descriptions nested
    without end.
    """
    try:
        yield
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        reason = ascii(str(error).splitlines()[0][:120]) if str(error) else type(error).__name__
        raise CorruptError(f"{path}: damaged archive ({reason}); fetch it again") from error
