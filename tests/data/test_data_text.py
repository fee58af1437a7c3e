"""Texts become rows of token ids: words, vocabulary, rows, and how many texts are held on the way."""

import random
import re
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import fuzzing, rows_of, small_chunks
from msgspec import convert

from edgetrain.data import text as module
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.data.text import LENGTH, LONGEST_WORD, LabelledText, Vocabulary, WordCounts, open_texts, split_words
from edgetrain.errors import InputError
from edgetrain.store.rows import RowFormat
from edgetrain.training.inputs import Shape

CLASSES = ("negative", "positive")
MADE = [
    LabelledText("train", 0, "Bad, bad film."),
    LabelledText("test", 1, "A good <br /><br />film; unseen!"),
    LabelledText("train", 1, "Good GOOD good film"),
    LabelledText("test", 0, ""),
]


def counts_of(*texts, most=1000):
    counts = WordCounts(most)
    for text in texts:
        counts.add(text)
    return counts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A film, I saw.", ["a", "film", "i", "saw"]),
        ("end.<br /><br />Begin<br />again<br>x<BR/>y", ["end", "begin", "again", "x", "y"]),
        ("It's 'quoted' 10/10", ["it's", "'quoted'", "10", "10"]),
        ("brave break br", ["brave", "break", "br"]),
        ("caf\u00e9 na\u00efve \u4f60\u597d", ["caf", "na", "ve"]),
        ("well-known\tline\nbreak\0null", ["well", "known", "line", "break", "null"]),
        ("", []),
        (" ?!.. <br />", []),
    ],
)
def test_words_are_those_of_hand_made_cases(text, words):
    assert split_words(text) == words


@fuzzing
@given(text=st.text())
def test_words_of_any_text_are_words(text):
    words = split_words(text)
    assert all(re.fullmatch("[a-z0-9']+", word) for word in words)
    assert split_words(" ".join(words)) == words
    assert split_words(text + "<br />" + text) == words * 2


@fuzzing
@given(text=st.text(), words=st.lists(st.text("abc", min_size=1), unique=True), length=st.integers(1, 9))
def test_rows_hold_ids_of_the_vocabulary_and_padding_behind_them(text, words, length):
    vocabulary = Vocabulary(words)
    row = vocabulary.row(text + " ".join(words), length)
    filled = min(length, len(split_words(text + " ".join(words))))
    assert (row.dtype, row.shape) == (np.int32, (length,))
    assert ((row[:filled] >= 1) & (row[:filled] < vocabulary.size)).all()
    assert (row[filled:] == 0).all()


def test_ids_go_by_frequency_then_by_the_alphabet():
    counts = counts_of("c b a", "b a", "zz zz zz")
    assert counts.most_frequent(9) == ["zz", "a", "b", "c"]
    assert counts.most_frequent(2) == ["zz", "a"]
    vocabulary = Vocabulary(counts.most_frequent(2))
    assert vocabulary.size == 4
    assert vocabulary.row("A zz b <br /> a", 6).tolist() == [3, 2, 1, 3, 0, 0]


def test_vocabulary_does_not_depend_on_the_order_of_texts():
    source = random.Random(0)
    texts = [" ".join(source.choices("abcdefghijklmnop", k=8)) for _ in range(50)]
    expected = counts_of(*texts).most_frequent(10)
    for _ in range(5):
        source.shuffle(texts)
        assert counts_of(*texts).most_frequent(10) == expected


def test_words_that_are_too_long_are_unknown():
    long, longer = "x" * LONGEST_WORD, "x" * (LONGEST_WORD + 1)
    counts = counts_of(f"{long} {longer} {longer}")
    assert counts.most_frequent(5) == [long]
    assert Vocabulary([long]).row(f"{longer} {long}", 2).tolist() == [1, 2]


def test_counted_words_are_bounded_and_frequent_ones_kept():
    counts = WordCounts(most=100)
    for number in range(2000):
        counts.add(f"the film w{number} v{number}")
        assert len(counts.counts) <= 100
    assert counts.most_frequent(2) == ["film", "the"]
    assert counts.counts["the"] == 2000
    counts.add(" ".join(f"u{number}" for number in range(300)) * 2)  # many at once, none of them rare
    assert len(counts.counts) <= 100


def test_made_texts_give_these_rows():
    data = open_texts("made", lambda: iter(MADE), "made", CLASSES)
    assert (data.name, data.shape, data.pixel_max, data.input) == ("made", (LENGTH,), None, "tokens")
    assert (data.classes, data.names, data.vocabulary) == (2, CLASSES, 5)  # good 2, bad 3, film 4 - by count
    x, y = rows_of(data.train)
    assert (x.dtype, y.dtype) == (np.int32, np.int64)
    ids = {word: number for number, word in enumerate(["good", "bad", "film"], 2)}
    assert x[0, :4].tolist() == [ids["bad"], ids["bad"], ids["film"], 0]
    assert x[1, :5].tolist() == [ids["good"]] * 3 + [ids["film"], 0]
    assert y.tolist() == [0, 1]
    x, y = rows_of(data.test)
    assert x[0, :5].tolist() == [1, ids["good"], ids["film"], 1, 0]
    assert (x[1] == 0).all()
    assert y.tolist() == [1, 0]
    assert (data.train.where, data.test.where) == ("made: train", "made: test")


def test_words_of_test_texts_have_no_id():
    texts = [*MADE, *[LabelledText("test", 0, "unseen " * 50)] * 3]
    assert open_texts("made", lambda: iter(texts), "made", CLASSES).vocabulary == 5


def test_long_texts_are_cut_and_the_vocabulary_is_limited(monkeypatch):
    monkeypatch.setattr(module, "WORDS", 3)
    long = " ".join(["a b c d"] * LENGTH)
    texts = [*MADE, LabelledText("train", 0, long)]
    data = open_texts("made", lambda: iter(texts), "made", CLASSES)
    assert data.vocabulary == 5
    assert rows_of(data.train)[0][2].tolist() == [2, 3, 4, 1] * (LENGTH // 4)


def test_chunks_hold_few_rows_and_can_be_asked_for_again(monkeypatch):
    texts = MADE * 5
    data = open_texts("made", lambda: iter(texts), "made", CLASSES)
    whole, labels = rows_of(data.train)
    with small_chunks(monkeypatch, LENGTH * 4 * 3):
        assert [len(values) for values, _ in data.train.chunks()] == [3, 3, 3, 1]
        again, same = rows_of(data.train)
    assert np.array_equal(whole, again)
    assert np.array_equal(labels, same)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda text: text.part == "train", "made: holds no test texts; expected"),
        (lambda text: text.part == "test", "made: holds no training texts of class negative; expected"),
        (lambda text: text.label == 0, "made: holds no training texts of class positive; expected"),
        (lambda text: False, "made: holds no training texts"),
    ],
)
def test_a_part_or_class_without_texts_is_refused(kept, message):
    with pytest.raises(InputError, match=message):
        open_texts("made", lambda: iter([text for text in MADE if kept(text)]), "made", CLASSES)


class _Counted(str):
    """A text that knows how many of its kind live."""

    live = most = 0

    def __new__(cls, value):
        cls.live += 1
        cls.most = max(cls.most, cls.live)
        return super().__new__(cls, value)

    def __del__(self):
        _Counted.live -= 1


def counted_texts():
    for number in range(500):
        yield LabelledText("test" if number % 5 == 0 else "train", number % 2, _Counted(f"a film of w{number}"))


def test_few_texts_are_held_at_once():
    _Counted.most = 0
    data = open_texts("made", counted_texts, "made", CLASSES)
    for part in (data.train, data.test):
        for _ in part.chunks():
            pass
    assert _Counted.most <= 3
    assert _Counted.live == 0


def test_memory_is_that_of_the_vocabulary_and_a_chunk():
    def texts(count):
        for number in range(count):
            words = " ".join(f"w{(number * 7 + place) % 1000}" for place in range(200))
            yield LabelledText("test" if number % 5 == 0 else "train", number % 2, words)

    def peak(count):
        tracemalloc.start()
        data = open_texts("made", lambda: texts(count), "made", CLASSES)
        for _ in data.train.chunks():
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgetrain.data.chunks.CHUNK_BYTES", 100 * LENGTH * 4)
        assert peak(600) < peak(200) + (128 << 10)  # the texts added take 400 kB, their rows as much


def test_counts_are_those_of_counter():
    texts = [text.text for text in MADE]
    expected = Counter(word for text in texts for word in split_words(text))
    assert counts_of(*texts).counts == expected


def text_shape():
    return Shape.of(open_texts("made", lambda: iter(MADE), "made", CLASSES))


def test_a_run_remembers_the_vocabulary():
    shape = text_shape()
    assert shape.vocabulary == 5
    assert shape.format == RowFormat((LENGTH,), "tokens")
    assert convert({**vars(shape), "shape": [LENGTH], "names": list(CLASSES)}, Shape) == shape


def test_records_without_a_vocabulary_still_open():
    values = {name: value for name, value in vars(text_shape()).items() if name != "vocabulary"}
    shape = convert(values, Shape)
    assert shape.vocabulary is None
    assert shape.format == RowFormat((LENGTH,), "float32")


def test_a_run_refuses_rows_of_another_kind():
    texts = open_texts("made", lambda: iter(MADE), "made", CLASSES)
    more = open_texts("more", lambda: iter([*MADE, LabelledText("train", 0, "other words")]), "more", CLASSES)
    labels = np.arange(4) % 2
    floats = from_arrays((np.zeros((4, LENGTH), np.int64), labels))
    pixels = from_arrays((np.zeros((4, LENGTH), np.uint8), labels), reading=Reading("image"))
    kinds = {"ids of 5 tokens": texts, "ids of 7 tokens": more, "rows of a table": floats, "8-bit pixels": pixels}
    for expected, trained in kinds.items():
        for found, rows in kinds.items():
            if found == expected:
                Shape.of(trained).check(rows)
                continue
            with pytest.raises(InputError, match=f"{rows.name}: holds {found}; this run was trained on {expected}"):
                Shape.of(trained).check(rows)
