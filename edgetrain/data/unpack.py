"""Take known files out of a tar archive: the archive decides neither where they go nor how large they are."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import IO

from edgetrain.data.archives import content, members, open_tar
from edgetrain.errors import CorruptError
from edgetrain.store.atomic import CHUNK, replacing


def unpack(archive: Path, sizes: dict[str, int], folder: Path) -> None:
    """Write the files named in ``sizes`` into ``folder``; everything else in the archive is passed over.

    Args:
        archive: a tar file, plain, ``.gz`` or ``.xz``.
        sizes: the bytes of each wanted file, by its name without folders.
        folder: where they go.

    Raises:
        InputError: the archive is empty.
        CorruptError: the archive is damaged, lacks a file, or holds one of another size.
        StorageError: the disk refused.
    """
    missing = dict(sizes)
    with open_tar(archive) as tar:
        for member in members(tar):
            name = PurePosixPath(member.name).name
            found = content(tar, member) if name in missing else None
            if found is not None:
                _check_size(archive, name, member.size, missing.pop(name))
                _write(found, folder / name)
    if missing:
        raise CorruptError(f"{archive}: lacks {', '.join(missing)}; fetch it again")


def _check_size(archive: Path, name: str, found: int, expected: int) -> None:
    if found != expected:
        raise CorruptError(f"{archive}: {name} holds {found} bytes, expected {expected}; fetch it again")


def _write(found: IO[bytes], target: Path) -> None:
    with replacing(target) as temporary, temporary.open("wb") as file:
        shutil.copyfileobj(found, file, CHUNK)
