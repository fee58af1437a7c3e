"""Labelled texts out of CSV files, good, bad and random."""

import csv
import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import damaged, fuzzing, put, survives
from made_reviews import opened, peak_of, refused, table

from edgetrain.data.imdb import LABELS
from edgetrain.data.text import MAX_TEXT_BYTES
from edgetrain.data.text_csv import csv_texts
from edgetrain.errors import CorruptError, EdgetrainError, InputError


def read_csv(tmp_path, content):
    return list(csv_texts(put(tmp_path / "imdb.csv", content), LABELS))


@pytest.mark.parametrize("label", LABELS)
def test_labels_and_splits_are_read_in_any_case(tmp_path, label):
    found = read_csv(tmp_path, table([(" Train", f"{label.upper()} ", "x"), ("TEST", label, "y")]))
    assert found == [("train", LABELS[label], "x"), ("test", LABELS[label], "y")]


def test_blank_lines_and_line_ends_within_quotes_are_no_rows(tmp_path):
    content = b'\ntext,label,split\r\n\r\n"a\r\nb,""c""",1,test\r\n\r\nlast,0,train'
    with pytest.raises(InputError, match="line 9: label is 'no'"):
        read_csv(tmp_path, content + b"\r\n\nx,no,test\n")
    assert read_csv(tmp_path, content) == [("test", 1, 'a\r\nb,"c"'), ("train", 0, "last")]


HEAD = b"text,label,split\nfine,1,test\n"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"text,label\nx,1\n", InputError, "line 1: the header is 'text', 'label'; expected text, label, split"),
        (b"text,text,label,split\n", InputError, "line 1: the header is .*each once"),
        (b'"a\nb",label\n', InputError, r"line 1: the header is 'a\\nb', 'label'; expected"),
        (b"a" * 100 + b",b\n", InputError, r"the header is 'a{40}\.\.\.', 'b';"),
        (b"\n\n", InputError, "the header is nothing"),
        (HEAD + b"x,2,test\n", InputError, "line 3: label is '2', expected one of 0, 1, neg, pos, negative, positive"),
        (HEAD + b"x,,test\n", InputError, "line 3: label is ''"),
        (HEAD + b"x,1,valid\n", InputError, "line 3: split is 'valid', expected one of train, test"),
        (HEAD + b"x,1\n", InputError, "line 3: 2 fields, expected at least 3"),
        (HEAD + b"caf\xe9,1,test\n", InputError, "line 3: 0xe9 at byte 3 is not UTF-8; save the file as UTF-8"),
        (HEAD + b'"\na\n\xff",1,test\n', InputError, "line 5: 0xff at byte 0 is not UTF-8"),
        (HEAD + b'"x"y,1,test\n', CorruptError, "line 3: not readable as CSV .*; write the file again"),
        (HEAD + b'x,1,test\n"never closed,1,test\n', CorruptError, "line 4: not readable as CSV"),
        (HEAD + b"a\rb,1,test\n", CorruptError, "line 3: not readable as CSV"),
        (HEAD + b"x" * MAX_TEXT_BYTES + b",1,test\n", InputError, "line 3: a row of more than 1048576 bytes"),
        (HEAD + b'"' + b"x\n" * MAX_TEXT_BYTES, InputError, "line 3: a row of more than 1048576 bytes"),
        (HEAD + b'a","\n' * MAX_TEXT_BYTES, InputError, "line 3: a row of more than 1048576 bytes"),
        (HEAD + b'"",a' + b',"\n"' * MAX_TEXT_BYTES, InputError, "line 3: a row of more than 1048576 bytes"),
    ],
)
def test_a_bad_csv_is_one_line_that_names_the_line(tmp_path, content, kind, message):
    refused(put(tmp_path / "imdb.csv", content), kind, message)


def test_long_fields_are_read_and_the_limit_of_other_readers_stays(tmp_path):
    before = csv.field_size_limit()
    content = HEAD + b"x" * (before + 1000) + b",1,test\n"
    lengths = []
    for found in csv_texts(put(tmp_path / "imdb.csv", content), LABELS):
        assert csv.field_size_limit() == before
        lengths.append(len(found.text))
    assert lengths == [4, before + 1000]
    for bad in (HEAD + b'"x"y,1,test\n', HEAD + b"x" * MAX_TEXT_BYTES):
        with pytest.raises(EdgetrainError):
            read_csv(tmp_path, bad)
        assert csv.field_size_limit() == before


def test_a_file_that_unpacks_to_one_endless_row_costs_little(tmp_path):
    for begin, filler in ((b"", b"x"), (b'"', b"\n"), (b'"', b",")):
        with gzip.open(tmp_path / "imdb.csv.gz", "wb", compresslevel=1) as file:
            file.write(HEAD + begin)
            for _ in range(32):
                file.write(filler * (1 << 20))
        assert peak_of(lambda: opened(tmp_path / "imdb.csv.gz")) < 24 << 20


@fuzzing
@given(data=st.data())
def test_damaged_tables_never_crash(tmp_path, data):
    content = data.draw(damaged(table(), 60))
    survives(lambda: opened(put(tmp_path / "imdb.csv", content)))


@fuzzing
@given(rest=st.binary() | st.text('",\r\n\0 xé').map(str.encode), head=st.sampled_from([b"", HEAD, table()]))
def test_random_tables_never_crash(tmp_path, rest, head):
    survives(lambda: opened(put(tmp_path / "imdb.csv", head + rest)))


fields = st.text(st.characters(codec="utf-8"), max_size=20)


@fuzzing
@given(texts=st.lists(fields, min_size=1, max_size=5), quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_any_text_comes_back_from_a_csv_as_it_was_written(tmp_path, texts, quoting):
    texts = [text.replace("\0", "") for text in texts]  # NUL is no CSV before Python 3.11
    found = read_csv(tmp_path, table([("train", "pos", text) for text in texts], quoting=quoting))
    assert [text.text for text in found] == texts
