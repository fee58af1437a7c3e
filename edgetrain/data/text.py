"""Texts as rows of token ids: the first words of each, looked up among the training texts' words.

A word is a run of ``a-z``, ``0-9`` and ``'`` in the lower-cased text, where ``<br />`` counts as a
space. Id 0 is padding, id 1 a word outside the vocabulary, id 2 the most frequent word. A text
without words is a row of padding.

``WORDS`` (20,000) and ``LENGTH`` (256) are our choices: of its net for IMDB the Mono-Forward paper
(arXiv 2501.09238, Table 6) says only that it is an MLP with an embedding of 50 and one hidden
layer of 100.

Texts are read again for each pass and one is held at a time: the first pass counts rows and words,
each later one gives the rows of a part.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.base import Chunk, DataSet, Part
from edgetrain.data.chunks import rows_per_chunk
from edgetrain.errors import InputError

WORDS = 20_000
LENGTH = 256
UNKNOWN, FIRST_WORD = 1, 2

LONGEST_WORD = 40  # letters; longer words are treated as unknown
MOST_COUNTED = 400_000  # different words; IMDB's training texts have fewer
MAX_TEXT_BYTES = 1 << 20

_BREAK = re.compile(r"<br\s*/?>")
_WORD = re.compile(r"[a-z0-9']+")


class LabelledText(NamedTuple):
    """A text, its class, and the part it belongs to: ``train`` or ``test``."""

    part: str
    label: int
    text: str


#: Starts a fresh pass over all texts, always in the same order.
Texts = Callable[[], Iterator[LabelledText]]


def split_words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(_BREAK.sub(" ", text.lower()))


class WordCounts:
    """How often each word was seen, in bounded memory.

    Exact up to ``most`` different words; beyond that the rarest so far are forgotten.
    """

    def __init__(self, most: int = MOST_COUNTED) -> None:
        self.most = most
        self.counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Take in the words of a text."""
        self.counts.update(word for word in split_words(text) if len(word) <= LONGEST_WORD)
        if len(self.counts) > self.most:
            self._forget()

    def most_frequent(self, number: int) -> list[str]:
        """The most frequent words, the most frequent one first; ties go by the alphabet."""
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [word for word, _ in ranked[:number]]

    def _forget(self) -> None:
        rarest = 1
        while len(self.counts) > self.most // 2:
            self.counts = Counter({word: count for word, count in self.counts.items() if count > rarest})
            rarest += 1


class Vocabulary:
    """The words that have an id of their own.

    Attributes:
        size: number of ids, padding and unknown words included.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._ids = {word: number for number, word in enumerate(words, FIRST_WORD)}
        self.size = len(self._ids) + FIRST_WORD

    def row(self, text: str, length: int = LENGTH) -> NDArray[np.int32]:
        """The ids of the text's first words [length], padded with 0."""
        ids = [self._ids.get(word, UNKNOWN) for word in split_words(text)[:length]]
        row = np.zeros(length, np.int32)
        row[: len(ids)] = ids
        return row


def open_texts(name: str, texts: Texts, where: str, class_names: tuple[str, ...]) -> DataSet:
    """The data set of labelled texts; one pass over them counts rows and words.

    Args:
        name: of the data set.
        texts: their source.
        where: what errors name.
        class_names: label 0 first.

    Raises:
        InputError: a part or a class is missing, or the source's own complaint.
        CorruptError: the source is damaged.
        StorageError: the source is unreadable.
    """
    rows: Counter[tuple[str, int]] = Counter()
    counts = WordCounts()
    for part, label, text in texts():
        rows[part, label] += 1
        if part == "train":
            counts.add(text)
    _check_parts(rows, where, class_names)
    vocabulary = Vocabulary(counts.most_frequent(WORDS))
    train, test = (_part(part, rows, texts, vocabulary, where) for part in ("train", "test"))
    classes = len(class_names)
    return DataSet(name, (LENGTH,), None, "tokens", classes, train, test, class_names, vocabulary.size)


def _check_parts(rows: Counter[tuple[str, int]], where: str, class_names: tuple[str, ...]) -> None:
    for label, name in enumerate(class_names):
        if not rows["train", label]:
            raise InputError(f"{where}: holds no training texts of class {name}; expected some of each class")
    if not any(part == "test" for part, _ in rows):
        raise InputError(f"{where}: holds no test texts; expected training and test texts")


def _part(part: str, rows: Counter[tuple[str, int]], texts: Texts, vocabulary: Vocabulary, where: str) -> Part:
    count = sum(number for (found, _), number in rows.items() if found == part)
    return Part(count, partial(_chunks, part, texts, vocabulary, where), f"{where}: {part}")


def _chunks(part: str, texts: Texts, vocabulary: Vocabulary, where: str) -> Iterator[Chunk]:
    """Token ids [n, LENGTH], int32, with their labels [n]."""
    step = rows_per_chunk(LENGTH * 4, where)
    rows = ((vocabulary.row(text), label) for found, label, text in texts() if found == part)
    while batch := list(islice(rows, step)):
        ids, labels = zip(*batch, strict=True)
        yield np.stack(ids), np.array(labels, np.int64)
