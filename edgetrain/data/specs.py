"""From what is typed after ``--data`` to a data set."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from edgetrain.data.base import DataSet
from edgetrain.data.breast_cancer import open_breast_cancer
from edgetrain.data.cifar import CifarFiles, open_cifar
from edgetrain.data.compressed import find
from edgetrain.data.digits import open_digits
from edgetrain.data.fetch import ensure, home_expanded, locate
from edgetrain.data.idx import IdxPair, open_idx
from edgetrain.data.imdb import open_imdb
from edgetrain.data.known import KNOWN, KnownSet
from edgetrain.data.layout import AS_FOUND, Reading
from edgetrain.data.npz import open_npz, open_npz_rows
from edgetrain.errors import InputError
from edgetrain.plugins import Registry

_READY = {"digits": open_digits, "breast-cancer": open_breast_cancer}  # need no files of the user's
_SUMMARIES = {
    "digits": "1,797 grey images of handwritten digits, 8x8, 10 classes; part of edgetrain",
    "breast-cancer": "a table of 569 rows and 30 columns, 2 classes; needs scikit-learn",
}
NAMES = (*_READY, *KNOWN)
#: Data sets of installed packages: functions without arguments.
OFFERED: Registry[Callable[[], DataSet]] = Registry("edgetrain.datasets", "data set", {})


def open_data(spec: str, reading: Reading = AS_FOUND) -> DataSet:
    """The data set that ``spec`` names: a known name, or else the path of an ``.npz`` file.

    A known name wins over a file of that name; ``./name`` is always a path. A known set that is
    nowhere on this machine is downloaded.

    Args:
        spec: the name or path.
        reading: what is stated of a file's inputs; a known set has its own reading.

    Raises:
        InputError: ``spec`` names nothing, what it names is not a data set, or the reading does not fit it.
        CorruptError: a file is damaged.
        StorageError: a file is unreadable or could not be downloaded.
    """
    if is_known(spec) and reading != AS_FOUND:
        flag = "--channels" if reading.input is None else "--input"
        raise InputError(f"{flag} is for your own data; edgetrain knows how {spec} is to be read: leave it out")
    if spec in _READY:
        return _READY[spec]()
    if spec in KNOWN:
        return open_known(KNOWN[spec], ensure(KNOWN[spec]))
    if spec in OFFERED:
        return _offered(spec)
    return open_npz(_npz_path(spec), reading)


def open_rows(spec: str, reading: Reading = AS_FOUND) -> DataSet:
    """What ``spec`` has to predict on, as the test part: a known set's test rows, or an ``.npz`` file's.

    ``reading`` is about files; a known set has its own.

    Raises:
        InputError: ``spec`` names nothing, or what it names has no rows.
        CorruptError: a file is damaged.
        StorageError: a file is unreadable or could not be downloaded.
    """
    if is_known(spec):
        return replace(open_data(spec), train=None)
    return open_npz_rows(_npz_path(spec), reading)


@dataclass(frozen=True)
class ListedSet:
    """A data set that is known by name.

    Attributes:
        name: what ``--data`` takes.
        summary: what it holds, in a line.
        here: whether it can be read without a download.
    """

    name: str
    summary: str
    here: bool


def known_sets() -> list[ListedSet]:
    """All data sets that are known by name; downloads nothing."""
    ready = [ListedSet("digits", _SUMMARIES["digits"], True)]
    ready.append(ListedSet("breast-cancer", _SUMMARIES["breast-cancer"], find_spec("sklearn") is not None))
    files = [ListedSet(known.name, known.summary, locate(known) is not None) for known in KNOWN.values()]
    return [*ready, *files, *(ListedSet(name, "of an installed package", True) for name in OFFERED)]


def is_path(spec: str) -> bool:
    """Whether ``spec`` is the path of a file rather than a name."""
    return spec.lower().endswith(".npz") and not is_known(spec)


def is_known(spec: str) -> bool:
    """Whether ``spec`` is the name of a data set, ours or an installed package's."""
    return spec in NAMES or spec in OFFERED


def _offered(name: str) -> DataSet:
    """A data set of an installed package.

    Raises:
        InputError: what the package offers is none.
    """
    found = OFFERED[name]
    data = found() if callable(found) else found
    if not isinstance(data, DataSet):
        raise InputError(f"data set {name!r}: the installed package gives a {type(data).__name__}; expected a DataSet")
    return data


def absolute(spec: str) -> str:
    """``spec`` as it means the same in every folder: a path made absolute, a name as it is.

    Raises:
        InputError: it begins with ``~`` and that home folder does not exist.
    """
    return str(home_expanded(spec).absolute()) if is_path(spec) else spec


def open_known(known: KnownSet, folder: Path) -> DataSet:
    """A known data set out of ``folder``, where each of its files is plain, ``.gz`` or ``.xz``.

    Raises:
        InputError: a file is not there, or files do not belong together.
        CorruptError: a file is damaged.
        StorageError: a file is unreadable.
    """
    if known.layout == "text":
        return open_imdb(known.name, _archive_or_instead(known, folder), known.class_names)
    train = [_found(folder, file) for file in known.train]
    test = [_found(folder, file) for file in known.test]
    if known.layout == "idx":
        return open_idx(known.name, IdxPair(*train), IdxPair(*test), len(known.class_names), known.class_names)
    files = (CifarFiles(train, known.file_rows[0]), CifarFiles(test, known.file_rows[1]))
    return open_cifar(known.name, *files, known.rows, known.class_names)


def _archive_or_instead(known: KnownSet, folder: Path) -> Path:
    """The one archive of all texts, or else the file that does for it."""
    (archive,) = known.files
    return find(folder, archive) or find(folder, known.instead) or _found(folder, archive)


def _found(folder: Path, file: str) -> Path:
    path = find(folder, file)
    if path is None:
        raise InputError(f"{folder}: has no {file} (nor .gz, .xz); put it there")
    return path


def _npz_path(spec: str) -> Path:
    if is_path(spec):
        return home_expanded(spec)
    names = (*NAMES, *OFFERED)
    close = difflib.get_close_matches(spec[:100].lower(), names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(f"unknown data set {spec!r}{hint}; known: {', '.join(names)}; a path to an .npz file works too")
