"""Where a known data set's files are; what is nowhere on this machine is downloaded and checked."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from edgetrain.data.compressed import find
from edgetrain.data.known import Download, KnownSet
from edgetrain.data.transfer import AbsentError, RemoteError, download_blocks
from edgetrain.data.unpack import unpack
from edgetrain.errors import CorruptError, InputError, StorageError
from edgetrain.store.atomic import replacing, storage_errors


def ensure(known: KnownSet) -> Path:
    """The folder that holds all of the set's files; downloads them to the user cache if none does.

    Looked for in ``$EDGETRAIN_DATA/<name>/``, then in the cache.

    Raises:
        StorageError: the download failed, or the disk refused.
        CorruptError: what was downloaded has another checksum; nothing of it is kept.
    """
    return locate(known) or fetch(known)


def locate(known: KnownSet) -> Path | None:
    """The folder that holds all of the set's files, or ``None``; downloads nothing."""
    folders = [cache_folder(known)]
    if given := os.environ.get("EDGETRAIN_DATA"):
        folders.insert(0, home_expanded(given) / known.name)
    return next((folder for folder in folders if _complete(known, folder)), None)


def fetch(known: KnownSet) -> Path:
    """Download what the user cache lacks of the set; returns its folder there.

    Raises:
        StorageError: the download failed, or the disk refused.
        CorruptError: what was downloaded has another checksum; nothing of it is kept.
    """
    folder = cache_folder(known)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for download in known.downloads:
                if not _complete(known, folder, download):
                    _fetch_one(known, download, folder)
    return folder


def cache_folder(known: KnownSet) -> Path:
    """The set's folder in the user cache: ``$XDG_CACHE_HOME`` or ``~/.cache``, then edgetrain/data."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return home_expanded(base) / "edgetrain" / "data" / known.name


def home_expanded(text: str) -> Path:
    """The path that ``text`` means, ``~`` being the home folder.

    Raises:
        InputError: it begins with ``~`` and that home folder does not exist.
    """
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # no such user, or no name that a user can have
        raise InputError(f"{text}: no such home folder; write the path without ~") from None


def _complete(known: KnownSet, folder: Path, download: Download | None = None) -> bool:
    """Whether the set's files, or those that one download brings, are all in ``folder``."""
    if download is None and known.instead and find(folder, known.instead):
        return True
    if download is None or download.archive:
        return all(find(folder, file) for file in known.files)
    return find(folder, download.file.removesuffix(".gz")) is not None


def _fetch_one(known: KnownSet, download: Download, folder: Path) -> None:
    target = folder / download.file
    with replacing(target) as temporary:
        _download(known, download, temporary)
    if download.archive:
        try:
            unpack(target, known.file_sizes, folder)
        finally:
            target.unlink(missing_ok=True)


def _download(known: KnownSet, download: Download, target: Path) -> None:
    """Save the file from the first place that has it."""
    *mirrors, last = _urls(known, download)
    try:
        for url in mirrors:
            with suppress(AbsentError):
                return _save(url, download, target)
        return _save(last, download, target)
    except RemoteError as error:
        raise StorageError(f"{error}; put the files in $EDGETRAIN_DATA/{known.name}/") from error


def _urls(known: KnownSet, download: Download) -> list[str]:
    """The publisher's URL; with ``EDGETRAIN_MIRROR`` instead MIRROR/<name>/<file>, then MIRROR/<file>."""
    if mirror := os.environ.get("EDGETRAIN_MIRROR", "").rstrip("/"):
        return [f"{mirror}/{known.name}/{download.file}", f"{mirror}/{download.file}"]
    return [f"{known.base_url}{download.file}"]


def _save(url: str, download: Download, target: Path) -> None:
    algorithm, expected = download.digest.split(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with target.open("wb") as file:
        for block in download_blocks(url):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != expected:
        raise CorruptError(
            f"{url}: {algorithm} is {digest.hexdigest()}, expected {expected}; nothing was kept, "
            "try again or another mirror"
        )
