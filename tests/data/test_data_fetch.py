"""Known sets are found, or downloaded from a server on this machine, and checked."""

import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from made_files import cifar_rows, cycle, idx_images, idx_labels, pixels, rows_of

from edgetrain.data import known, specs, transfer
from edgetrain.data.fetch import cache_folder, ensure, fetch, locate
from edgetrain.data.known import KNOWN, Download
from edgetrain.data.specs import open_data
from edgetrain.errors import CorruptError, StorageError

IMAGES, LABELS = pixels(20, 5, 4), cycle(20, 10)
COLOURS = pixels(4, 3, 32, 32)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that a server on 127.0.0.1 offers; all look-ups are cut off from this machine's own data."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("EDGETRAIN_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("EDGETRAIN_DATA", "EDGETRAIN_MIRROR", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def tiny_mnist(monkeypatch):
    """The entry of mnist, with the checksums of tiny files; their packed content by name."""
    content = {
        file: gzip.compress(idx_images(IMAGES) if "images" in file else idx_labels(LABELS), mtime=0)
        for file in KNOWN["mnist"].files
    }
    downloads = tuple(
        Download(f"{file}.gz", f"sha256:{hashlib.sha256(packed).hexdigest()}") for file, packed in content.items()
    )
    monkeypatch.setitem(known.KNOWN, "mnist", replace(KNOWN["mnist"], downloads=downloads))
    return {f"{file}.gz": packed for file, packed in content.items()}


def serve(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def archive_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members:
            if isinstance(content, bytes):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                tar.addfile(content)
    return buffer.getvalue()


def tiny_cifar(monkeypatch, folder, packed, digest=None):
    md5 = digest or hashlib.md5(packed).hexdigest()
    entry = replace(
        KNOWN["cifar10"],
        file_rows=(4, 4),
        downloads=(Download("cifar-10-binary.tar.gz", f"md5:{md5}", archive=True),),
    )
    monkeypatch.setitem(known.KNOWN, "cifar10", entry)
    serve(folder, {"cifar-10-binary.tar.gz": packed})
    return entry


@pytest.mark.parametrize("place", ["mnist", "."])
def test_idx_files_are_downloaded_once_with_one_line_each(served, tiny_mnist, capsys, place):
    serve(served / place, tiny_mnist)
    x, y = rows_of(open_data("mnist").train)
    assert np.array_equal(x[:, 0], IMAGES)
    assert np.array_equal(y, LABELS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("downloading http://127.0.0.1") == len(captured.err.splitlines())
    for path in served.rglob("*.gz"):
        path.unlink()
    open_data("mnist")
    assert capsys.readouterr().err == ""


def test_only_what_the_cache_lacks_is_downloaded(served, tiny_mnist, capsys):
    serve(served / "mnist", tiny_mnist)
    fetch(KNOWN["mnist"])
    (cache_folder(KNOWN["mnist"]) / "train-labels-idx1-ubyte.gz").unlink()
    capsys.readouterr()
    fetch(KNOWN["mnist"])
    assert capsys.readouterr().err.count("train-labels") == len(capsys.readouterr().err.splitlines()) + 1


def test_wrong_checksum_keeps_nothing(served, tiny_mnist):
    serve(served / "mnist", {name: content + b"x" for name, content in tiny_mnist.items()})
    with pytest.raises(CorruptError, match=r"train-images-idx3-ubyte.gz: sha256 is \w+, expected \w+"):
        open_data("mnist")
    assert [p.name for p in cache_folder(KNOWN["mnist"]).iterdir() if p.name != ".lock"] == []


def test_absent_file_says_where_to_put_it(served, tiny_mnist):
    with pytest.raises(StorageError, match=r"could not download http://\S+: HTTP 404 .*\$EDGETRAIN_DATA/mnist/"):
        open_data("mnist")


def test_no_connection_is_one_line(monkeypatch, tiny_mnist):
    monkeypatch.setenv("EDGETRAIN_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"could not download \S+: .*put the files in") as caught:
        open_data("mnist")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("EDGETRAIN_MIRROR", "nonsense")
    with pytest.raises(StorageError, match="could not download nonsense/"):
        open_data("mnist")


def test_connection_that_ends_early_keeps_nothing(served, tiny_mnist, monkeypatch):
    serve(served / "mnist", tiny_mnist)
    monkeypatch.setattr(
        _QuietHandler, "copyfile", lambda self, source, output: output.write(source.read(10)), raising=True
    )
    with pytest.raises(StorageError, match="connection ended after 10 of"):
        open_data("mnist")
    assert [p.name for p in cache_folder(KNOWN["mnist"]).iterdir() if p.name != ".lock"] == []


def test_users_folder_comes_before_the_cache(served, tiny_mnist, tmp_path, monkeypatch):
    serve(served / "mnist", tiny_mnist)
    entry = KNOWN["mnist"]
    assert locate(entry) is None
    cached = fetch(entry)
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path / "mine"))
    assert ensure(entry) == cached
    mine = tmp_path / "mine" / "mnist"
    mine.mkdir(parents=True)
    serve(mine, dict(list(tiny_mnist.items())[:3]))
    assert ensure(entry) == cached
    serve(mine, tiny_mnist)
    assert ensure(entry) == mine


def test_archive_is_unpacked_to_its_expected_files_alone(served, monkeypatch, tmp_path):
    rows = cifar_rows(COLOURS, cycle(4, 10))
    members = [(f"cifar-10-batches-bin/{file}", rows) for file in KNOWN["cifar10"].files[1:]]
    link = tarfile.TarInfo("data_batch_1.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    odd = [("../../outside.bin", rows), ("/x/readme.html", b"hi"), ("link", link)]
    entry = tiny_cifar(monkeypatch, served, archive_of([*odd, *members, ("../data_batch_1.bin", rows)]))
    data = open_data("cifar10")
    assert (data.train.rows, data.test.rows) == (20, 4)
    assert np.array_equal(rows_of(data.test)[0], COLOURS)
    assert {p.name for p in cache_folder(entry).iterdir()} - {".lock"} == set(entry.files)
    assert not list(tmp_path.rglob("outside.bin"))
    assert not (cache_folder(entry) / "data_batch_1.bin").is_symlink()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("data_batch_1.bin", b"short")], "data_batch_1.bin holds 5 bytes, expected 12292"),
        ([("other", b"")], "lacks data_batch_1.bin, "),
    ],
)
def test_archive_of_other_files_is_corrupt_and_not_kept(served, monkeypatch, members, message):
    entry = tiny_cifar(monkeypatch, served, archive_of(members))
    with pytest.raises(CorruptError, match=message):
        open_data("cifar10")
    assert {p.name for p in cache_folder(entry).iterdir()} <= {".lock"}


def test_damaged_archive_is_corrupt(served, monkeypatch):
    tiny_cifar(monkeypatch, served, archive_of([("other", bytes(5000))])[:-30])
    with pytest.raises(CorruptError, match=r"damaged archive|lacks"):
        open_data("cifar10")


def tiny_imdb(monkeypatch, folder):
    """The entry of imdb, with the checksum of a tiny archive that is served; the archive."""
    reviews = [
        (f"aclImdb/{part}/{label}/{label}_1.txt", f"a {label} film".encode())
        for part in ("test", "train")
        for label in ("neg", "pos")
    ]
    packed = archive_of([("aclImdb/README", b"read me"), *reviews])
    download = Download("aclImdb_v1.tar.gz", f"md5:{hashlib.md5(packed).hexdigest()}")
    monkeypatch.setitem(known.KNOWN, "imdb", replace(KNOWN["imdb"], downloads=(download,)))
    serve(folder, {"aclImdb_v1.tar.gz": packed})
    return packed


@pytest.mark.parametrize("place", ["imdb", "."])
def test_reviews_are_downloaded_once_and_stay_packed(served, monkeypatch, capsys, place):
    packed = tiny_imdb(monkeypatch, served / place)
    data = open_data("imdb")
    assert (data.train.rows, data.test.rows, data.vocabulary) == (2, 2, 6)
    assert rows_of(data.train)[0][:, :4].tolist() == [[2, 4, 3, 0], [2, 5, 3, 0]]  # a 2, film 3, neg 4, pos 5
    assert capsys.readouterr().err.startswith("downloading http://127.0.0.1")
    folder = cache_folder(KNOWN["imdb"])
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"aclImdb_v1.tar.gz"}
    assert (folder / "aclImdb_v1.tar.gz").read_bytes() == packed
    (served / place / "aclImdb_v1.tar.gz").unlink()
    open_data("imdb")
    assert capsys.readouterr().err == ""


def test_reviews_of_another_checksum_are_not_kept(served, monkeypatch):
    packed = tiny_imdb(monkeypatch, served)
    serve(served, {"aclImdb_v1.tar.gz": packed[:-1]})
    with pytest.raises(CorruptError, match=r"aclImdb_v1.tar.gz: md5 is \w+, expected \w+; nothing was kept"):
        open_data("imdb")
    assert {path.name for path in cache_folder(KNOWN["imdb"]).iterdir()} <= {".lock"}


@pytest.mark.parametrize("name", ["imdb.csv", "imdb.csv.xz", "aclImdb_v1.tar", "aclImdb_v1.tar.gz"])
def test_either_file_of_reviews_makes_the_download_unnecessary(tmp_path, monkeypatch, name):
    assert locate(KNOWN["imdb"]) is None
    monkeypatch.setenv("EDGETRAIN_DATA", str(tmp_path / "mine"))
    mine = tmp_path / "mine" / "imdb"
    mine.mkdir(parents=True)
    assert locate(KNOWN["imdb"]) is None
    serve(mine, {name: b"x"})
    assert locate(KNOWN["imdb"]) == mine
    (mine / name).unlink()
    cached = cache_folder(KNOWN["imdb"])
    cached.mkdir(parents=True)
    serve(cached, {name: b"x"})
    assert locate(KNOWN["imdb"]) == cached


def test_bar_is_drawn_on_a_terminal(served, tiny_mnist, capsys, monkeypatch):
    serve(served / "mnist", tiny_mnist)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch(KNOWN["mnist"])
    assert "downloading train-images-idx3-ubyte.gz" in capsys.readouterr().err


def test_table_of_known_sets_is_sound():
    assert set(KNOWN) < set(specs.NAMES)
    for name, entry in KNOWN.items():
        assert entry.name == name
        assert len(set(entry.class_names)) == len(entry.class_names)
        assert entry.base_url.endswith("/")
        for download in entry.downloads:
            algorithm, digest = download.digest.split(":")
            assert len(digest) == 2 * hashlib.new(algorithm).digest_size
    assert len(KNOWN["cifar100"].class_names) == 100
    assert KNOWN["cifar100"].file_sizes == {"train.bin": 153_700_000, "test.bin": 30_740_000}


def test_a_server_that_sends_without_end_is_cut_off(served, tiny_mnist, monkeypatch):
    serve(served, {**tiny_mnist, "train-images-idx3-ubyte.gz": bytes(5000)})
    monkeypatch.setattr(transfer, "_MOST_BYTES", 4000)
    with pytest.raises(StorageError, match=r"it has 5000 bytes or more, expected at most 4000; put the files in"):
        ensure(KNOWN["mnist"])
    monkeypatch.setattr(transfer, "_announced", lambda response: None)  # as it may say nothing of the length
    with pytest.raises(StorageError, match="or more, expected at most 4000"):
        ensure(KNOWN["mnist"])
    assert not [path for path in cache_folder(KNOWN["mnist"]).iterdir() if path.name != ".lock"]


def test_a_server_that_takes_too_long_is_cut_off(served, tiny_mnist, monkeypatch):
    serve(served, tiny_mnist)
    monkeypatch.setattr(transfer, "_LONGEST_S", -1.0)
    with pytest.raises(StorageError, match="took more than"):
        ensure(KNOWN["mnist"])
