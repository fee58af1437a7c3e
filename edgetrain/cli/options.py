"""Flags that commands share, made from the settings themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from edgetrain.config import SIZES, Settings, parse_numbers, parse_size, resolve

F = TypeVar("F", bound=Callable[..., Any])
QUICKSTART = "quickstart"


def settings_options(function: F) -> F:
    """One flag for each setting; flags that are not given are left out of the keyword arguments' meaning."""
    hints = get_type_hints(Settings)
    for setting in reversed(fields(Settings)):
        if setting.metadata["flag"]:
            function = _option(setting.name, hints[setting.name])(function)
    return click.option("--profile", metavar="NAME|FILE", help="Start from the settings of a profile.")(function)


def chosen_options(names: Sequence[str]) -> Callable[[F], F]:
    """Flags of some settings."""
    hints = get_type_hints(Settings)

    def add(function: F) -> F:
        for name in reversed(names):
            function = _option(name, hints[name])(function)
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


def print_list(heading: str, entries: Sequence[tuple[str, str]]) -> None:
    """Print names with a line each on stdout, as help does."""
    formatter = click.HelpFormatter()
    with formatter.section(heading):
        formatter.write_dl(entries)
    click.echo(formatter.getvalue(), nl=False)


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


class GroupedCommand(click.Command):
    """A command whose help lists the flags of settings under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See ``click.Command``."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                setting = _SETTINGS.get(parameter.name or "")
                sections.setdefault("Options" if setting is None else setting.metadata["group"], []).append(record)
        general = sections.pop("Options", [])
        for heading, records in (*sections.items(), ("Options", general)):
            with formatter.section(heading):
                formatter.write_dl(records)


_SETTINGS = {setting.name: setting for setting in fields(Settings)}


def _option(name: str, hint: Any) -> Callable[[F], F]:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    flag, default = f"--{name.replace('_', '-')}", _SETTINGS[name].default
    help = _SETTINGS[name].metadata["help"].replace("``", "") + "."
    if default is not None and default is not False:
        help += f"  [default: {default}]"
    if bool in kinds:
        return click.option(flag, name, is_flag=True, default=None, help=help)
    literals = [kind for kind in ([hint, *kinds]) if get_origin(kind) is Literal]
    if literals:
        return click.option(flag, name, type=click.Choice(get_args(literals[0])), help=help)
    if any(get_origin(kind) is list for kind in kinds):
        return click.option(flag, name, type=_Numbers(), metavar="N|N,N,...", help=help)
    if name in SIZES:
        return click.option(flag, name, type=_Size(name), metavar="SIZE", help=help)
    kind = int if int in kinds else float if float in kinds else str
    return click.option(flag, name, type=kind, help=help)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or several separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See ``click.ParamType``."""
        try:
            return parse_numbers(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Size(click.ParamType):  # type: ignore[type-arg]
    """A number in the unit of a setting, or with a unit of its own."""

    name = "size"

    def __init__(self, setting: str):
        self._setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See ``click.ParamType``."""
        try:
            return parse_size(value, SIZES[self._setting]) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)
