"""A named set of tensors in one safetensors file: atomic, durable, checksummed.

The library's writer does not fsync and its reader accepts flipped bytes, so both guarantees are
added here. Metadata is one JSON value under one key: with several keys the bytes of a file would
differ between processes.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgetrain.errors import CorruptError, StorageError
from edgetrain.store.atomic import CHUNK, checksum, replacing, storage_errors, sync_file, sync_folder, verify
from edgetrain.store.entries import FileEntry

_METADATA = "edgetrain"
_HEADER_LIMIT = 100 << 20
# Mapping a file doubles its memory on unified RAM, and dies of SIGBUS if the file shrinks.
_PREAD = {"backend": "pread"} if "backend" in str(inspect.signature(safe_open)) else {}


@dataclass(frozen=True)
class Spilled:
    """A unit that waits on disk between visits, not durable and not in the journal: a file for each kind."""

    files: dict[str, FileEntry]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> FileEntry:
    """Write host tensors to ``path``; returns its entry for the journal.

    Raises:
        StorageError: the disk refused; ``path`` is then as it was.
    """
    with replacing(path) as temporary:
        size = write_plain(temporary, tensors, metadata, path)
        digest = checksum(temporary)
    return FileEntry(path.name, digest, size)


def write_plain(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], shown: Path | None = None
) -> int:
    """Write host tensors to ``path`` without any promise; returns the file's size in bytes.

    Raises:
        StorageError: the disk refused; it names ``shown``, by default ``path``.
        OSError: likewise, where the library lets it through.
    """
    path.touch()
    mode = path.stat().st_mode  # as the umask wants it; the library's files are for their owner alone
    try:
        save_file(dict(tensors), path, {_METADATA: json.dumps(metadata, sort_keys=True)})
        path.chmod(mode)
    except SafetensorError as error:  # the library wraps the operating system's refusal
        code = re.search(r"\(os error (\d+)\)", str(error))
        reason = os.strerror(int(code[1])) if code else str(error)
        raise StorageError(f"{shown or path}: {reason[:1].lower()}{reason[1:]}") from error
    return path.stat().st_size


def move_durably(source: Path, target: Path, file: FileEntry) -> FileEntry:
    """Rename a plainly written file to ``target`` once it is on the medium; returns its entry there.

    Raises:
        CorruptError: it does not hold what was written.
        StorageError: the disk refused.
    """
    verify(source, file.checksum, file.size)
    with storage_errors(target):
        sync_file(source)
        source.replace(target)
        sync_folder(target.parent)
    return FileEntry(target.name, file.checksum, file.size)


def read_tensors(path: Path, expected: FileEntry | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file, on the host; size and checksum are verified first if they are given.

    Raises:
        CorruptError: it is not what was written, or not a whole safetensors file.
        StorageError: it is missing or unreadable.
    """
    if expected is not None:
        verify(path, expected.checksum, expected.size)
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with storage_errors(path), safe_open(path, framework="pt", **_PREAD) as file:
            yield file
    except (SafetensorError, TypeError) as error:  # TypeError: torch has no tensor of such a shape
        reason = str(error).splitlines()[0]
        raise CorruptError(f"{path}: not a whole safetensors file ({reason})") from error


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, bounded before it is read.

    Raises:
        CorruptError: the header is missing or malformed.
    """
    with storage_errors(path), path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if length > min(_HEADER_LIMIT, path.stat().st_size - 8):
            raise CorruptError(f"{path}: no safetensors header")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: no safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CorruptError(f"{path}: no safetensors header")
    return header


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON value that ``write_tensors`` or ``join`` put beside the tensors.

    Raises:
        CorruptError: the file is not one of ours.
    """
    try:
        metadata = json.loads(read_header(path)["__metadata__"][_METADATA])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: holds no edgetrain metadata") from error
    if not isinstance(metadata, dict):
        raise CorruptError(f"{path}: holds no edgetrain metadata")
    return metadata


def join(target: Path, parts: Iterable[tuple[str, Path]], metadata: Mapping[str, Any]) -> FileEntry:
    """Write one safetensors file by copying the bytes of others behind one header.

    Nothing is gathered in memory: a model of any size is joined in chunks of 1 MiB.

    Args:
        target: the file to write.
        parts: (prefix for the tensors' names, file), in order.
        metadata: kept as the new file's metadata.

    Raises:
        CorruptError: a part is not a safetensors file.
        StorageError: the disk refused.
    """
    header: dict[str, Any] = {"__metadata__": {_METADATA: json.dumps(metadata, sort_keys=True)}}
    sources, offset = [], 0
    for prefix, path in parts:
        ranges, size = _checked_layout(path)
        infos = read_header(path)
        for name, (start, stop) in ranges.items():
            header[prefix + name] = {**infos[name], "data_offsets": [offset + start, offset + stop]}
        sources.append((path, size))
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(target) as temporary:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for path, size in sources:
                _copy_tail(path, size, file)
        digest = checksum(temporary)
    return FileEntry(target.name, digest, target.stat().st_size)


def _checked_layout(path: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Byte range of each tensor, counted from the first tensor's start, and bytes of all tensors.

    Raises:
        CorruptError: the header's ranges are not those of a whole file.
    """
    with _opened(path):  # the library checks that shapes, types and ranges belong together
        pass
    with storage_errors(path), path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        data = path.stat().st_size - 8 - length
    ranges = {}
    for name, info in read_header(path).items():
        if name == "__metadata__":
            continue
        found = info.get("data_offsets") if isinstance(info, dict) else None
        if not isinstance(found, list) or len(found) != 2 or not all(type(edge) is int for edge in found):
            raise CorruptError(f"{path}: tensor {name!r} has no byte range")
        ranges[name] = (found[0], found[1])
    ends = sorted(ranges.values())
    gapless = all(before[1] == after[0] for before, after in pairwise([(0, 0), *ends, (data, data)]))
    if not gapless or any(start > stop for start, stop in ends):
        raise CorruptError(f"{path}: its tensors do not fill its {data} bytes; the file is cut or damaged")
    return ranges, data


def _copy_tail(path: Path, size: int, file: Any) -> None:
    """Copy the last ``size`` bytes of ``path``: its tensors without its header."""
    with path.open("rb") as source:
        source.seek(-size, 2)
        while chunk := source.read(CHUNK):
            file.write(chunk)
