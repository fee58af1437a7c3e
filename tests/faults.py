"""Faults of a disk, one at a time: every operation on a folder's files is counted, and one of them made to fail.

An operation is known by its kind, its file's name and how often that came before, as a thread that reads ahead may
come sooner or later than the last time.

Operations are those of ``os`` and of opened files, and the two of safetensors. A fault is one of

- ``error``: the operation fails once (no space for writes, an I/O error otherwise);
- ``short``: a ``pwrite`` or ``preadv`` does half of its work;
- ``crash``: the process dies before it;
- ``torn``: the process dies in the middle of a write;
- ``power``: the power fails before it. What was not fsynced is gone or torn, names that were not fsynced are as before.

A process that died does nothing more: each further operation raises ``Crash`` again.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from edgetrain.store import tensors

WRITES, READS = {"write", "pwrite", "save"}, {"read", "preadv", "load"}
MODES = ("error", "short", "crash", "torn", "power")


Point = tuple[str, str, int]


class Crash(BaseException):
    """The process is dead."""


class Medium:
    """What a folder would hold if the power failed now, at the worst: a model of what fsync promises.

    A file's content is what it was when the file was last fsynced, or half of it if it never was; a name stands
    for what it did when the folder was last fsynced. Folders themselves are there as soon as they are made.
    """

    def __init__(self, root: Path):
        self.root = root
        self.contents: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, dict[str, int]] = {}
        self.held: dict[int, int] = {}  # descriptors, so that no inode is used again
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())] if root.is_dir() else []:
            for path in folder.iterdir():
                if path.is_file():
                    self.sync(path)
            self.sync(folder)

    def sync(self, path: Path) -> None:
        """A file or folder was fsynced."""
        if path.is_dir():
            self.names[path] = {name.name: self._inode(name) for name in path.iterdir() if name.is_file()}
        else:
            self.contents[self._inode(path)] = path.read_bytes()

    def fail(self) -> None:
        """Make the folder what it would be after the power failed."""
        after = {
            folder / name: self.contents.get(inode, self._torn(inode))
            for folder, names in self.names.items()
            for name, inode in names.items()
        }
        if not self.root.exists():
            return
        folders = [path for path in self.root.rglob("*") if path.is_dir()]
        shutil.rmtree(self.root)
        if self.root in self.names:
            for folder in {self.root, *folders, *(path.parent for path in after)}:
                folder.mkdir(parents=True, exist_ok=True)
            for path, content in after.items():
                path.write_bytes(content)

    def close(self) -> None:
        for descriptor in self.held.values():
            os.close(descriptor)

    def _inode(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def _torn(self, inode: int) -> bytes:
        size = os.fstat(self.held[inode]).st_size
        return os.pread(self.held[inode], size // 2, 0)


class Faults:
    """Counts the operations below ``root`` and lets the one ``at`` fail.

    Attributes:
        seen: operation, file name and count of each.
    """

    def __init__(self, root: Path, at: Point | None = None, mode: str = "error"):
        self.root, self.at, self.mode = root, at, mode
        self.seen: list[Point] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self.dead = False
        self._inside = False  # an operation of our own
        self._medium = Medium(root) if mode == "power" else None

    @contextmanager
    def injected(self) -> Iterator[Faults]:
        """A scope in which everything goes through here; afterwards the folder is as the fault left it."""
        self._open = io.open
        patches = [
            mock.patch.object(os, name, self._of_path(name, getattr(os, name)))
            for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "open")
        ]
        patches += [
            mock.patch.object(os, name, self._of_descriptor(name, getattr(os, name)))
            for name in ("pwrite", "preadv", "fsync", "posix_fallocate")
        ]
        patches += [
            mock.patch.object(io, "open", self._opened),
            mock.patch.object(tensors, "save_file", self._save(tensors.save_file)),
            mock.patch.object(tensors, "safe_open", self._of_path("load", tensors.safe_open)),
        ]
        try:
            for patch in patches:
                patch.start()
            yield self
        finally:
            for patch in patches:
                patch.stop()
            if self._medium is not None:
                if self.dead:
                    self._medium.fail()
                self._medium.close()

    def _happens(self, kind: str, path: str) -> bool:
        """Count an operation; whether it is torn or short."""
        if self._inside or not self._ours(path):
            return False
        if self.dead:
            raise Crash
        point = kind, Path(path).name, self._counts[kind, Path(path).name]
        self._counts[point[:2]] += 1
        self.seen.append(point)
        if point != self.at:
            return False
        if self.mode == "error":
            number = errno.ENOSPC if kind in WRITES or kind == "posix_fallocate" else errno.EIO
            raise OSError(number, os.strerror(number), path)
        if self.mode in ("short", "torn"):
            return True
        self.dead = True
        raise Crash

    def _ours(self, path: str) -> bool:
        if not os.path.isabs(path):  # relative to an open folder: shutil.rmtree
            return self.dead
        name = os.path.basename(path)
        return name != "lock" and (path + "/").startswith(f"{self.root}/")

    def _of_path(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any, *more: Any, **named: Any) -> Any:
            self._happens(kind, os.fspath(path))
            return real(path, *more, **named)

        return operation

    def _of_descriptor(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(descriptor: int, *more: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self._happens(kind, path):
                return self._in_half(kind, real, descriptor, *more)
            result = real(descriptor, *more)
            if kind == "fsync" and self._medium is not None and self._ours(path) and not self._inside:
                self._alone(self._medium.sync, Path(path))
            return result

        return operation

    def _in_half(self, kind: str, real: Callable[..., Any], descriptor: int, data: Any, offset: int) -> Any:
        view = memoryview(data if kind == "pwrite" else data[0]).cast("B")
        half = view[: max(1, len(view) // 2)]
        done = real(descriptor, half if kind == "pwrite" else [half], offset)
        if self.mode == "torn":
            self.dead = True
            raise Crash
        return done

    def _save(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(values: Any, path: Any, metadata: Any) -> None:
            torn = self._happens("save", os.fspath(path))
            real(values, path, metadata)
            if torn:
                os.truncate(path, os.stat(path).st_size // 2)
                self.dead = True
                raise Crash

        return operation

    def _opened(self, file: Any, *more: Any, **named: Any) -> Any:
        opened = self._open(file, *more, **named)
        path = file if isinstance(file, int) else os.fspath(file)
        return opened if isinstance(path, int) or not self._ours(path) else _File(opened, self, path)

    def _alone(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._inside = True
        try:
            work(*arguments)
        finally:
            self._inside = False


class _File:
    """An opened file whose reads and writes are counted."""

    def __init__(self, file: Any, faults: Faults, path: str):
        self._file, self._faults, self._path = file, faults, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        self._faults._happens("read", self._path)
        return iter(self._file)

    def read(self, *size: int) -> Any:
        self._faults._happens("read", self._path)
        return self._file.read(*size)

    def write(self, data: Any) -> int:
        torn = self._faults._happens("write", self._path)
        done: int = self._file.write(data[: len(data) // 2] if torn else data)
        self._file.flush()
        if torn:
            self._faults.dead = True
            raise Crash
        return done


def points(seen: list[Point], mode: str) -> list[Point]:
    """The operations to which a fault can happen."""
    kinds = {"short": {"pwrite", "preadv"}, "torn": WRITES - {"read"}}.get(mode)
    return [point for point in seen if kinds is None or point[0] in kinds]
