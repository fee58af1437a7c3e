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
from functools import partial
from pathlib import Path

from edgetrain.data.archives import content, members, open_tar
from edgetrain.data.base import DataSet
from edgetrain.data.text import MAX_TEXT_BYTES, LabelledText, open_texts
from edgetrain.data.text_csv import csv_texts
from edgetrain.errors import CorruptError

LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}

_REVIEW = re.compile(r"(?:\./)?aclImdb/(train|test)/(neg|pos)/[^/]+\.txt")


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
        CorruptError: the archive is damaged, or a review in it is not a regular file of at most 1 MiB.
        StorageError: the archive is unreadable.
    """
    with open_tar(path) as tar:
        for member in members(tar):
            if found := _REVIEW.fullmatch(member.name):
                text = _read(tar, member, path).decode(errors="replace")
                yield LabelledText(found[1], LABELS[found[2]], text)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    found = content(tar, member)
    if found is None:
        raise CorruptError(f"{path}: {_shown(member)} is not a regular file, expected a review; fetch it again")
    if member.size > MAX_TEXT_BYTES:
        raise CorruptError(
            f"{path}: {_shown(member)} holds {member.size} bytes, expected a review of at most {MAX_TEXT_BYTES}; "
            "fetch it again"
        )
    return found.read()


def _shown(member: tarfile.TarInfo) -> str:
    return ascii(member.name[:80])
