"""Made reviews as the official archive's layout and as a CSV file, and what opening them is held against."""

import csv
import io
import tarfile
import tracemalloc

import pytest

from edgetrain.data.imdb import open_imdb
from edgetrain.errors import EdgetrainError

CLASSES = ("negative", "positive")


REVIEWS = [
    ("test", "neg", 'Dull, "very" dull;\nand long.'),
    ("test", "pos", ""),
    ("train", "neg", "Bad.<br /><br />Really bad, it's"),
    ("train", "neg", "No caf\u00e9 scene, " + "no " * 300),
    ("train", "pos", "Good film"),
]


def member(name, content=b"", **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry, content


def archive(members, layout=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for entry, content in members:
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def review_members(reviews=REVIEWS):
    numbered = enumerate(reviews)
    return [member(f"aclImdb/{part}/{label}/{n}_7.txt", text.encode()) for n, (part, label, text) in numbered]


def table(reviews=REVIEWS, columns=("text", "label", "split"), **options):
    out = io.StringIO()
    writer = csv.writer(out, **options)
    writer.writerow(columns)
    for part, label, text in reviews:
        values = {"text": text, "label": label, "split": part}
        writer.writerow([values.get(column, "x") for column in columns])
    return out.getvalue().encode()


def opened(path):
    return open_imdb("imdb", path, CLASSES)


def refused(path, kind, message):
    """Opening the file is refused by one line that names it."""
    with pytest.raises(kind, match=message) as caught:
        opened(path)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def peak_of(read):
    tracemalloc.start()
    try:
        with pytest.raises(EdgetrainError):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
