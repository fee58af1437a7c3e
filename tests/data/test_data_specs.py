"""What is typed after --data becomes a data set, or one line that helps."""

import subprocess
import sys

import numpy as np
import pytest
from made_files import cycle, pixels, put, rows_of

from edgetrain.data.known import KNOWN
from edgetrain.data.specs import NAMES, open_data, open_known, open_rows
from edgetrain.data.split import stratified
from edgetrain.errors import CorruptError, InputError


def test_digits_are_shipped():
    data = open_data("digits")
    x, y = rows_of(data.train)
    assert (data.name, data.shape, data.pixel_max, data.input, data.classes) == (
        "digits",
        (1, 8, 8),
        16.0,
        "image",
        10,
    )
    assert (data.train.rows, data.test.rows) == (1437, 360)
    assert (x.dtype, x.min(), x.max()) == (np.uint8, 0, 16)
    assert y.dtype == np.int64
    assert np.bincount(rows_of(data.test)[1]).min() >= 35


def test_digits_are_those_of_scikit_learn_in_the_documented_split():
    found = pytest.importorskip("sklearn.datasets").load_digits()
    is_test = stratified(found.target.astype(np.int64), 360, "digits")
    data = open_data("digits")
    for part, keep in ((data.train, ~is_test), (data.test, is_test)):
        x, y = rows_of(part)
        assert np.array_equal(x[:, 0], found.images[keep])
        assert np.array_equal(y, found.target[keep])


def test_breast_cancer_is_a_table():
    pytest.importorskip("sklearn")
    data = open_data("breast-cancer")
    x, y = rows_of(data.train)
    assert (data.name, data.shape, data.pixel_max, data.input, data.classes) == (
        "breast-cancer",
        (30,),
        None,
        "table",
        2,
    )
    assert (data.train.rows, data.test.rows) == (455, 114)
    assert x.dtype == np.float64
    assert abs(y.mean() - rows_of(data.test)[1].mean()) < 0.01
    assert data.names == ("malignant", "benign")


def test_absent_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'edgetrain\[sklearn\]'"):
        open_data("breast-cancer")


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("mnits", "did you mean mnist?"),
        ("CIFAR10", "did you mean cifar10?"),
        ("zzz", "known: digits"),
        ("", "known"),
    ],
)
def test_unknown_name_lists_the_known_ones(spec, hint):
    with pytest.raises(InputError) as caught:
        open_data(spec)
    line = str(caught.value)
    assert hint in line
    assert all(name in line for name in NAMES)
    assert ".npz" in line
    assert "\n" not in line


def test_paths_end_in_npz_and_known_names_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("some.npz", x=pixels(10, 3), y=cycle(10, 2))
    np.savez("digits", x=pixels(10, 3), y=cycle(10, 2))
    assert open_data("some.npz").shape == (3,)
    assert open_data("digits").shape == (1, 8, 8)
    assert open_data("./digits.npz").shape == (3,)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_data("~/some.npz").shape == (3,)


REVIEWS = b"text,label,split\na bad film,neg,train\na good film,pos,train\nunseen film,neg,test\n"


def test_reviews_are_found_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "imdb"
    folder.mkdir()
    put(folder / "imdb.csv", REVIEWS, ".gz")
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path))
    data = open_data("imdb")
    assert (data.name, data.shape, data.vocabulary, data.names) == ("imdb", (256,), 6, ("negative", "positive"))
    assert (data.train.rows, data.test.rows) == (2, 1)
    rows = open_rows("imdb")
    assert (rows.train, rows.vocabulary) == (None, 6)
    assert np.array_equal(rows_of(rows.test)[0], rows_of(data.test)[0])
    assert rows_of(rows.test)[0][0, :3].tolist() == [1, 3, 0]  # a, film, bad, good: ids 2, 3, 4, 5


def test_the_archive_comes_before_the_table(tmp_path):
    known = KNOWN["imdb"]
    with pytest.raises(InputError, match=r"has no aclImdb_v1.tar \(nor .gz, .xz\)"):
        open_known(known, tmp_path)
    put(tmp_path / "imdb.csv", REVIEWS)
    assert open_known(known, tmp_path).train.rows == 2
    put(tmp_path / "aclImdb_v1.tar", b"no archive", ".gz")
    with pytest.raises(CorruptError, match="aclImdb_v1.tar.gz: damaged archive"):
        open_known(known, tmp_path)


def test_rows_to_predict_on(tmp_path):
    np.savez(tmp_path / "new.npz", x=pixels(10, 3))
    data = open_rows(str(tmp_path / "new.npz"))
    assert (data.train, data.test.rows) == (None, 10)
    data = open_rows("digits")
    assert (data.train, data.test.rows) == (None, 360)


def test_readers_do_not_import_torch():
    code = (
        "import sys; from edgetrain.data.specs import open_data; open_data('digits'); "
        "print({'torch', 'sklearn', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
