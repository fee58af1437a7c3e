"""The method of a run: one of ours, of an installed package, or a class of the user's own."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from contextlib import suppress
from typing import Any

from edgetrain.baselines import BASELINES
from edgetrain.config import Settings, did_you_mean
from edgetrain.errors import InputError
from edgetrain.objectives import OBJECTIVES
from edgetrain.objectives.base import Defaults, Objective
from edgetrain.plugins import Registry, is_own, load
from edgetrain.store.entries import MethodFingerprint
from edgetrain.store.run import RunFolder

METHODS: Registry[type[Objective]] = Registry("edgetrain.objectives", "method", {**OBJECTIVES, **BASELINES})
CLASS = "class"  # the method of settings where a class was given in Python
_VOTES = ("sum", "last", "classifier")


def method_of(settings: Settings, own: Any = None) -> type[Objective]:
    """The rule or baseline of a run.

    Args:
        settings: name it; a file of the user's is imported if they do.
        own: the user's own class instead.

    Raises:
        InputError: unknown method, or not an objective.
    """
    if settings.like is not None and settings.method not in BASELINES:
        raise InputError(f"--like is for baselines ({', '.join(BASELINES)}); {settings.method} has its own options")
    if settings.like is not None:
        _named("like", settings.like)
    if own is not None:
        return checked(getattr(own, "__name__", repr(own)), own)
    if is_own(settings.method):
        return checked(settings.method, load(settings.method, "method"))
    return _named("method", settings.method)


def _named(flag: str, name: str) -> type[Objective]:
    if name not in METHODS:
        known = f"; known: {', '.join(METHODS)}, or path/to/my_rule.py:MyRule"
        raise InputError(f"unknown {flag} {name!r}{did_you_mean(name, METHODS) or known}")
    return checked(name, METHODS[name])


def checked(spec: str, kind: Any) -> type[Objective]:
    """A class that can be a method.

    Raises:
        InputError: it is none; the message says what is missing.
    """
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise InputError(f"method {spec!r}: is not a class derived from edgetrain.objectives.base.Objective")
    if lacking := sorted(getattr(kind, "__abstractmethods__", ())):
        raise InputError(f"method {spec!r}: {kind.__name__} does not define {', '.join(lacking)}")
    name, vote = getattr(kind, "name", None), getattr(kind, "vote", None)
    if not isinstance(name, str) or not name:
        raise InputError(f"method {spec!r}: {kind.__name__}.name is {name!r}; expected a text")
    if not isinstance(getattr(kind, "defaults", None), Defaults):
        raise InputError(
            f"method {spec!r}: {kind.__name__}.defaults is missing; expected Defaults(schedule, optimizer, lr)"
        )
    if vote not in _VOTES:
        raise InputError(f"method {spec!r}: {kind.__name__}.vote is {vote!r}; expected one of {', '.join(_VOTES)}")
    return kind


def given_again(path: Any, kept: Settings, method: Any) -> Any:
    """The user's own class of a run, which the caller names again; ``None`` for runs of other methods.

    Args:
        path: the run folder.
        kept: its settings.
        method: ``path/to/my_rule.py:MyRule`` or a class, or ``None``.

    Raises:
        InputError: it is not named, or the run needs none.
    """
    if not is_own(kept.method) and kept.method != CLASS:
        if method is not None and method != kept.method:
            raise InputError(f"{path}: was trained with {kept.method!r}, not with {method!r}; leave --method out")
        return None
    if method is None:
        again = f"--method {kept.method}" if is_own(kept.method) else "method=MyRule in Python"
        raise InputError(f"{path}: this run's method is your own code; name it again: {again}")
    return checked(method, load(method, "method")) if isinstance(method, str) else method


def fingerprint(method: type[Objective]) -> MethodFingerprint:
    """Name and digest of a rule of the user's own: its source without comments and docstrings, with its bases'."""
    sources = []
    for kind in method.__mro__:
        if not kind.__module__.startswith("edgetrain.") and kind.__module__ not in ("builtins", "abc"):
            with suppress(OSError, TypeError, SyntaxError):  # typed into an interpreter
                sources.append(ast.dump(_without_docstrings(ast.parse(textwrap.dedent(inspect.getsource(kind))))))
    digest = hashlib.blake2b("\n".join(sources).encode(), digest_size=16).hexdigest() if sources else ""
    return MethodFingerprint(method.name, digest)


def check_method(folder: RunFolder, method: type[Objective]) -> None:
    """Compare a rule of the user's own with the one that the run in a folder was trained with.

    Raises:
        InputError: they differ.
    """
    begin, found = folder.begin(), fingerprint(method)
    known = None if begin is None else begin.method
    if known is None:
        return
    if known.name != found.name or ("" not in (known.digest, found.digest) and known != found):
        raise InputError(
            f"{folder.path}: this method ({found.name}) is not the one that the run was trained with"
            f" ({known.name}): its code differs; use the same"
        )


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = body[1:]  # type: ignore[attr-defined,index]
    return tree
