"""What can be named: our own objectives, nets and data sets, those of installed packages, and a user's own files.

An installed package offers what it has under an entry point of the groups ``edgetrain.objectives`` (subclasses of
``objectives.base.Objective``), ``edgetrain.nets`` (``nets.spec.Family``) and ``edgetrain.datasets`` (functions without
arguments that return a ``data.base.DataSet``). Our own names win. A package is imported
only when its name is asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from edgetrain.errors import InputError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Things by name.

    Args:
        group: of the entry points.
        kind: what a thing is called in messages.
        own: our own.
    """

    def __init__(self, group: str, kind: str, own: Mapping[str, T]):
        self._group, self._kind, self._own = group, kind, dict(own)

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        return self._load(self._offered()[name])

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._offered()

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._offered() if name not in self._own)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def is_ours(self, name: str) -> bool:
        """Whether a name is one of our own."""
        return name in self._own

    def _offered(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group)}

    def _load(self, point: EntryPoint) -> T:
        try:
            found: T = point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else point.value
            raise InputError(
                f"{self._kind} {point.name!r} of the installed package {package}: {type(error).__name__}: {error}"
            ) from error
        return found


def is_own(spec: str | None) -> bool:
    """Whether a spec names something in a Python file of the user's: ``path/to/file.py:name``."""
    return ".py:" in (spec or "")


def load(spec: str, kind: str) -> Any:
    """What ``path/to/file.py:name`` names; besides installed packages, the only foreign code that is ever run.

    Args:
        spec: file and name.
        kind: what it is called in messages: ``net``, ``method``.

    Raises:
        InputError: no such file or name, or the file fails when it is imported.
    """
    path, _, name = spec.rpartition(":")
    if not _is_file(path):
        raise InputError(f"{kind} {spec!r}: no file {path}; expected path/to/{kind}.py:NAME")
    module_spec = importlib.util.spec_from_file_location(f"_edgetrain_{kind}_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{kind} {spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and others look for it
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise InputError(f"{kind} {spec!r}: {path} fails on import: {said}") from error
    if not hasattr(module, name):
        raise InputError(f"{kind} {spec!r}: {path} has no {name!r}")
    return getattr(module, name)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # the name is too long or none, or a folder on the way may not be read
        return False
