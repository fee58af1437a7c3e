"""The ``edgetrain`` command: finds the subcommand, and turns every error into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from typing import Any, NoReturn

import click

from edgetrain import __version__
from edgetrain.errors import EdgetrainError, EdgetrainWarning, Stopped

COMMANDS = {
    "fit": "Train a network one cell at a time, within a memory budget.",
    "plan": "Show what a run would take, without training.",
    "evaluate": "Measure the accuracy of a finished run.",
    "predict": "Predict the labels of new data with a finished run.",
    "cells": "Change a finished run's cells: list, append, drop, retrain.",
    "report": "Write an HTML report of one or more runs.",
    "profile": "Compare the peak memory of methods by depth, width and batch size.",
    "methods": "List the local learning rules and baselines.",
    "nets": "List the families of nets.",
    "data": "List the data sets that are known by name.",
    "doctor": "Check this machine: device, memory, disk, speed, and possible problems.",
}
EPILOG = """\b
Exit codes: 0 done; 2 wrong input; 3 disk or I/O; 4 corrupt file; 5 run folder in use;
  6 budget too small; 7 training diverged; 70 internal error;
  130, 143, 129 stopped by SIGINT, SIGTERM or --time-limit, SIGHUP, after a checkpoint.

Example: edgetrain fit --data mnist --net mlp:1000x2 --max-gpu-mb 64"""


class Terminated(BaseException):
    """The process was asked to end: SIGTERM, or SIGHUP when its terminal closed."""


class _LazyGroup(click.Group):
    """Imports a command's file only when the command is used, so that help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgetrain.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="edgetrain")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train deep networks one cell at a time, under a memory budget that you state."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> NoReturn:
    """Run the command line and exit with one of the codes that ``--help`` lists."""
    debug = "--debug" in sys.argv or os.environ.get("EDGETRAIN_DEBUG", "") not in ("", "0")
    if sys.platform == "win32":
        _end(2, "native Windows is not supported; use WSL2", debug=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminate)
    warnings.showwarning = _show_warning
    try:
        code = cli.main(standalone_mode=False)  # what a command exits with, if it does
    except BaseException as error:
        _end(*_verdict(error), debug)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    """Our own warnings as one line; others are for developers and stay away from users."""
    if isinstance(message, EdgetrainWarning):
        print(f"edgetrain: {' '.join(str(message).split())}", file=sys.stderr)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated(number)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and line of an error."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 70), ""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, ""
    if isinstance(error, click.ClickException):
        return 2, error.format_message()
    if isinstance(error, EdgetrainError):
        return error.exit_code, str(error)
    if isinstance(error, Stopped):
        return error.exit_code, str(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return 130, "stopped"
    if isinstance(error, Terminated):
        return 128 + error.args[0], "stopped"
    return _unforeseen(error)


def _unforeseen(error: BaseException) -> tuple[int, str]:
    from edgetrain.memory.device import is_out_of_memory

    if is_out_of_memory(error):
        return 6, f"out of memory although the plan fits the budget: {error}; use a smaller --max-gpu-mb"
    if isinstance(error, OSError):
        return 3, f"{error.filename or 'I/O'}: {error.strerror or error}"
    return 70, f"internal error: {type(error).__name__}: {error}; please report it with the output of --debug"


def _end(code: int, line: str, debug: bool) -> NoReturn:
    if debug and code not in (0, 130, 143, 129):
        traceback.print_exc()
    if line:
        with suppress(OSError):  # the terminal may be gone
            print(f"edgetrain: {' '.join(line.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
