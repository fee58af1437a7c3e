"""Flags that commands share, made from the settings themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from edgetrain.config import Settings, resolve

F = TypeVar("F", bound=Callable[..., Any])
QUICKSTART = "quickstart"


def settings_options(function: F) -> F:
    """One flag for each setting; flags that are not given are left out of the keyword arguments' meaning."""
    hints = get_type_hints(Settings)
    for setting in reversed(fields(Settings)):
        if setting.metadata["flag"]:
            function = _option(setting.name, hints[setting.name], setting.metadata["help"].replace("``", ""))(function)
    return click.option("--profile", metavar="NAME|FILE", help="Start from a profile's settings.")(function)


def chosen_options(names: Sequence[str]) -> Callable[[F], F]:
    """Flags of some settings."""
    hints = get_type_hints(Settings)
    helps = {setting.name: setting.metadata["help"].replace("``", "") for setting in fields(Settings)}

    def add(function: F) -> F:
        for name in reversed(names):
            function = _option(name, hints[name], helps[name])(function)
        return function

    return add


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """A scope in which what a user's own code prints goes to stderr, since stdout is for results."""
    with redirect_stdout(sys.stderr):
        yield


def output_options(function: F) -> F:
    """``--json`` and ``--debug``."""
    function = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")(function)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(function)


def given_settings(flags: dict[str, Any], profile: str | None) -> tuple[Settings, dict[str, Any]]:
    """The resolved settings, and what of them was stated as flags.

    Without a profile and without ``--data`` the quickstart profile is taken.

    Raises:
        InputError: a setting is wrong.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if profile is None and "data" not in given:
        profile = QUICKSTART
    return resolve(given, profile), given


def _option(name: str, hint: Any, help: str) -> Callable[[F], F]:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    flag = f"--{name.replace('_', '-')}"
    if bool in kinds:
        return click.option(flag, name, is_flag=True, default=None, help=f"{help}.")
    literals = [kind for kind in ([hint, *kinds]) if get_origin(kind) is Literal]
    if literals:
        return click.option(flag, name, type=click.Choice(get_args(literals[0])), help=f"{help}.")
    kind = int if int in kinds else float if float in kinds else str
    return click.option(flag, name, type=kind, help=f"{help}.")
