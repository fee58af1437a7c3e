"""The IMDB reviews out of the official archive's layout or a CSV file, whole or damaged."""

import csv
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import PACKERS, damaged, fuzzing, put, rows_of, survives
from made_reviews import REVIEWS, archive, member, opened, peak_of, refused, review_members, table

from edgetrain.data.imdb import LABELS, archive_texts
from edgetrain.data.text import LENGTH, MAX_TEXT_BYTES
from edgetrain.errors import CorruptError, InputError


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("aclImdb_v1.tar", archive(review_members())),
        ("aclImdb_v1.tar", archive(review_members(), tarfile.PAX_FORMAT)),
        ("imdb.csv", table()),
        ("imdb.csv", table(quoting=csv.QUOTE_ALL, lineterminator="\n")),
        ("imdb.csv", b"\xef\xbb\xbf" + table()),
        ("imdb.csv", table(columns=("id", "split", "text", "label", "more"))),
    ],
)
def test_archive_and_csv_give_the_same_rows(tmp_path, name, content, suffix):
    data = opened(put(tmp_path / name, content, suffix))
    assert (data.name, data.shape, data.classes, data.names) == ("imdb", (LENGTH,), 2, ("negative", "positive"))
    assert (data.train.rows, data.test.rows) == (3, 2)
    words = ["no", "bad", "caf", "film", "good", "it's", "really", "scene"]
    assert data.vocabulary == len(words) + 2
    ids = {word: number for number, word in enumerate(words, 2)}
    x, y = rows_of(data.train)
    assert y.tolist() == [0, 0, 1]
    assert x[0, :5].tolist() == [ids["bad"], ids["really"], ids["bad"], ids["it's"], 0]
    assert x[1].tolist() == [ids[word] for word in ("no", "caf", "scene")] + [ids["no"]] * (LENGTH - 3)
    assert x[2, :3].tolist() == [ids["good"], ids["film"], 0]
    x, y = rows_of(data.test)
    assert y.tolist() == [0, 1]
    assert x[0, :6].tolist() == [1, 1, 1, 1, 1, 0]
    assert not x[1].any()


def test_everything_else_in_the_archive_is_passed_over(tmp_path):
    others = [
        member("aclImdb", type=tarfile.DIRTYPE),
        member("aclImdb/train/unsup/0_0.txt", b"unlabelled"),
        member("aclImdb/train/urls_pos.txt", b"http://"),
        member("aclImdb/train/labeledBow.feat", bytes(2 << 20)),
        member("aclImdb/train/pos/deeper/0_1.txt", b"no review"),
        member("../../aclImdb/train/pos/0_1.txt", b"no review"),
        member("/aclImdb/train/pos/0_1.txt", b"no review"),
        member("aclImdb/train/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("dev", type=tarfile.CHRTYPE),
        member("long" * 60, b"long name"),
    ]
    path = put(tmp_path / "aclImdb_v1.tar", archive([*others, *review_members(), *others]), ".gz")
    assert [(part, label, text) for part, label, text in archive_texts(path)] == [
        (part, LABELS[label], text) for part, label, text in REVIEWS
    ]
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_names_may_begin_with_the_current_folder_and_bytes_need_not_be_utf8(tmp_path):
    entries = [member("./aclImdb/test/pos/1_9.txt", b"caf\xe9")]
    assert list(archive_texts(put(tmp_path / "a.tar", archive(entries)))) == [("test", 1, "caf\ufffd")]


LINK = {"type": tarfile.SYMTYPE, "linkname": "0_7.txt"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (member("aclImdb/test/pos/9.txt", **LINK), "'aclImdb/test/pos/9.txt' is not a regular file, expected a review"),
        (member("aclImdb/test/pos/9.txt", type=tarfile.LNKTYPE, linkname="x"), "is not a regular file"),
        (member("aclImdb/test/pos/9.txt", type=tarfile.FIFOTYPE), "is not a regular file"),
        (member("aclImdb/test/pos/9.txt", type=tarfile.CHRTYPE), "is not a regular file"),
        (member("aclImdb/test/pos/9.txt", type=tarfile.DIRTYPE), "is not a regular file"),
        (
            member("aclImdb/test/pos/9\n.txt", bytes(MAX_TEXT_BYTES + 1)),
            r"'aclImdb/test/pos/9\\n.txt' holds 1048577 bytes, expected a review of at most 1048576",
        ),
    ],
)
def test_a_review_that_is_no_plain_small_file_is_refused(tmp_path, entry, message):
    path = put(tmp_path / "aclImdb_v1.tar", archive([*review_members(), entry]), ".gz")
    refused(path, CorruptError, message)


WHOLE = archive(review_members())


def header(name, size, kind=tarfile.REGTYPE):
    entry, _ = member(name, type=kind)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "damaged archive"),
        (b"hello" * 1000, "damaged archive"),
        (WHOLE[:512], "damaged archive"),
        (WHOLE[:700], "damaged archive"),
        (WHOLE[:1024], "damaged archive"),  # between two members: an end without its mark
        (WHOLE[:1024] + b"x" * 512 + WHOLE[1536:], "damaged archive .*invalid header"),
        (WHOLE[:1024] + b"b" + WHOLE[1025:], "damaged archive .*bad checksum"),
        (header("x", 1 << 60) + bytes(1024), "a header of 1152921504606846976 bytes"),
        (header("x", -(1 << 60)) + bytes(1024), "a header of -"),
        (header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME) + bytes(1024), "a header of 1073741824 bytes"),
        (header("x", 1 << 30, tarfile.XHDTYPE) + bytes(1024), "a header of 1073741824 bytes"),
        (header("x", 0, tarfile.GNUTYPE_LONGNAME) * 3000 + bytes(1024), "damaged archive"),
    ],
)
def test_a_damaged_archive_is_one_line(tmp_path, content, message):
    for suffix in PACKERS:
        refused(put(tmp_path / "aclImdb_v1.tar", content, suffix), CorruptError, message)


def test_a_size_that_an_extension_gives_is_bounded_too(tmp_path):
    entry, _ = member("aclImdb/other")
    entry.pax_headers = {"size": str(1 << 60)}
    content = archive([(entry, b""), *review_members()], tarfile.PAX_FORMAT)
    refused(put(tmp_path / "a.tar", content), CorruptError, "a member of 1152921504606846976 bytes")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_compression_is_one_line(tmp_path, suffix):
    for name, content in (("aclImdb_v1.tar", WHOLE), ("imdb.csv", table())):
        path = put(tmp_path / name, content, suffix)
        packed = path.read_bytes()
        for found in (packed[:-6], packed[: len(packed) // 2], b"not compressed at all", packed[:-6] + b"123456"):
            path.write_bytes(found)
            refused(path, CorruptError, "damaged archive")


@pytest.mark.parametrize("name", ["aclImdb_v1.tar", "aclImdb_v1.tar.gz", "imdb.csv", "imdb.csv.xz"])
def test_an_empty_file_is_one_line(tmp_path, name):
    refused(put(tmp_path / name, b""), InputError, "the file is empty")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (("train",), "holds no test texts"),
        (("test",), "holds no training texts of class negative"),
        ((), "holds no training texts"),
    ],
)
def test_without_a_part_is_refused(tmp_path, kept, message):
    reviews = [review for review in REVIEWS if review[0] in kept]
    refused(put(tmp_path / "imdb.csv", table(reviews)), InputError, message)
    path = put(tmp_path / "a.tar", archive([member("aclImdb/README", b"x"), *review_members(reviews)]), ".gz")
    refused(path, InputError, message)


def test_members_of_the_archive_are_not_kept(tmp_path):
    def peak(count):
        members = [member(f"aclImdb/train/unsup/{n}_0.txt", b"x") for n in range(count)]
        path = put(tmp_path / "a.tar", archive(members))
        del members
        return peak_of(lambda: opened(path))

    assert peak(4000) < peak(400) + (200 << 10)  # 4 MB if they were


@fuzzing
@given(data=st.data())
def test_damaged_archives_never_crash(tmp_path, data):
    content = data.draw(damaged(WHOLE, 512 * data.draw(st.integers(1, 5))))
    path = put(tmp_path / "aclImdb_v1.tar", content, data.draw(st.sampled_from(["", ".gz"])))
    survives(lambda: opened(path))


@fuzzing
@given(data=st.data(), layout=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_damaged_extension_headers_never_crash(tmp_path, data, layout):
    entry, content = member("aclImdb/train/pos/" + "n" * 150 + ".txt", b"good film")
    if layout == tarfile.PAX_FORMAT:
        entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}
    whole = archive([(entry, content), *review_members()], layout)
    survives(lambda: opened(put(tmp_path / "a.tar", data.draw(damaged(whole, 1536)))))


def test_rows_are_the_same_at_each_pass(tmp_path):
    data = opened(put(tmp_path / "a.tar", WHOLE, ".gz"))
    assert np.array_equal(rows_of(data.train)[0], rows_of(data.train)[0])
