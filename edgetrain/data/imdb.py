"""The IMDB reviews: the official archive as it is, or a CSV file of the same texts.

The archive has ``aclImdb/{train,test}/{pos,neg}/*.txt``, a review each; all else in it (the reviews
without labels, word lists) is passed over. It is read as a stream and never unpacked to disk, so each
pass over the texts decompresses it again. Rows come in its order, all of a class after the other.

A. L. Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from edgetrain.data.base import DataSet
from edgetrain.data.compressed import open_stream
from edgetrain.data.text import MAX_TEXT_BYTES, LabelledText, open_texts
from edgetrain.data.text_csv import csv_texts
from edgetrain.errors import CorruptError

LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}

_REVIEW = re.compile(r"(?:\./)?aclImdb/(train|test)/(neg|pos)/[^/]+\.txt")
_EXTENSIONS = frozenset("xgXLK")  # types of blocks that describe the next member, which tarfile reads whole
_MAX_EXTENSION = 64 << 10
_MAX_MEMBER = 1 << 30  # tarfile would step block by block over whatever a damaged header claims


def open_imdb(name: str, path: Path, class_names: tuple[str, ...]) -> DataSet:
    """The reviews in the archive ``*.tar`` or the file ``*.csv``, each plain, ``.gz`` or ``.xz``.

    Reads all of it once, to count rows and words.

    Raises:
        InputError: a part, a class or a column is missing, or a row holds what no row may hold.
        CorruptError: the file is damaged.
        StorageError: the file is unreadable.
    """
    is_csv = ".csv" in path.suffixes[-2:]
    texts = partial(csv_texts, path, LABELS) if is_csv else partial(archive_texts, path)
    return open_texts(name, texts, str(path), class_names)


def archive_texts(path: Path) -> Iterator[LabelledText]:
    """The reviews of the archive, in its order; bytes that are no UTF-8 become U+FFFD.

    Raises:
        InputError: the file is empty.
        CorruptError: the archive is damaged, or a review in it is no file of at most 1 MiB.
        StorageError: the archive is unreadable.
    """
    with open_stream(path) as stream:
        with _damage_named(path), _opened(cast(IO[bytes], stream)) as tar:
            for member in _members(tar):
                if found := _REVIEW.fullmatch(member.name):
                    content = _read(tar, member, path)
                    yield LabelledText(found[1], LABELS[found[2]], content.decode(errors="replace"))
        while stream.read(MAX_TEXT_BYTES):  # up to the end, where the checksum of the compression is
            pass


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


def _opened(stream: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        if not 0 <= member.size <= _MAX_MEMBER:  # an extension may have changed it
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        yield member
        cast(Any, tar).members.clear()  # tarfile keeps all that it has seen: 100 MB for this archive


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if content is None:
        raise CorruptError(f"{path}: {_shown(member)} is no plain file, expected a review; fetch it again")
    if member.size > MAX_TEXT_BYTES:
        raise CorruptError(
            f"{path}: {_shown(member)} holds {member.size} bytes, expected a review of at most {MAX_TEXT_BYTES}; "
            "fetch it again"
        )
    return content.read()


def _shown(member: tarfile.TarInfo) -> str:
    return ascii(member.name[:80])


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
