"""Take known files out of a tar archive: the archive decides neither where they go nor how large they are."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from edgetrain.errors import CorruptError
from edgetrain.store.atomic import CHUNK, replacing


def unpack(archive: Path, sizes: dict[str, int], folder: Path) -> None:
    """Write the files named in ``sizes`` into ``folder``; everything else in the archive is passed over.

    Args:
        archive: a ``.tar.gz`` file.
        sizes: the bytes of each wanted file, by its name without folders.
        folder: where they go.

    Raises:
        CorruptError: the archive is damaged, lacks a file, or holds one of another size.
        StorageError: the disk refused.
    """
    missing = dict(sizes)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if member.isreg() and name in missing else None
                if content is not None:
                    _check_size(archive, name, member.size, missing.pop(name))
                    _write(content, folder / name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptError(f"{archive}: damaged archive ({reason}); fetch it again") from error
    if missing:
        raise CorruptError(f"{archive}: lacks {', '.join(missing)}; fetch it again")


def _check_size(archive: Path, name: str, found: int, expected: int) -> None:
    if found != expected:
        raise CorruptError(f"{archive}: {name} holds {found} bytes, expected {expected}; fetch it again")


def _write(content: IO[bytes], target: Path) -> None:
    with replacing(target) as temporary, temporary.open("wb") as file:
        shutil.copyfileobj(content, file, CHUNK)
