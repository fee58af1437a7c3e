"""``edgetrain cells``: change one cell of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from msgspec import to_builtins

from edgetrain.cli.options import chosen_options, output_options, stdout_for_results
from edgetrain.errors import CorruptError

EPILOG = """\b
Examples: edgetrain cells runs/mnist-mf list
          edgetrain cells runs/mnist-mf append --net mlp:1000x3 --epochs 5
          edgetrain cells runs/mnist-mf drop 3
          edgetrain cells runs/mnist-mf retrain 2 --lr 3e-4"""
_EDITABLE = ("epochs", "lr", "weight_decay", "optimizer", "batch_size", "classifier_epochs", "views", "max_gpu_mb")


@click.command("cells", epilog=EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("action", type=click.Choice(["list", "append", "drop", "retrain"]))
@click.argument("number", type=int, required=False)
@click.option(
    "--net", help="For append: a longer net that starts with the run's cells. For your own modules: the same net again."
)
@click.option("--method", metavar="FILE.py:CLASS", help="The method again, for a run of your own class.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@chosen_options(_EDITABLE)
@output_options
def command(
    run: Path,
    action: str,
    number: int | None,
    net: str | None,
    method: str | None,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Change the cells of a finished run; earlier cells stay as they are.

    list shows the cells and whether their files are intact. append trains new cells after the existing ones.
    drop removes cell NUMBER (by default the last) and all cells after it. retrain trains cell NUMBER again, and
    all cells after it, which learn from its outputs.
    """
    changes = {name: value for name, value in flags.items() if value is not None}
    _check(action, number, net, changes)
    if action == "list":
        _list(run, net, method, as_json)
        return
    from edgetrain.report.terminal import progress_display, show_run
    from edgetrain.training import edits

    with stdout_for_results(), progress_display(quiet) as callback:
        if action == "append":
            changed = edits.append(run, net, changes, callback=callback, method=method)
        elif action == "drop":
            changed = edits.drop(run, number, net, callback=callback, method=method)
        else:
            assert number is not None
            changed = edits.retrain(run, number, net, changes, callback=callback, method=method)
    if as_json:
        click.echo(json.dumps(changed.record.as_dict()))
    else:
        show_run(changed.record)


def _check(action: str, number: int | None, net: str | None, changes: dict[str, Any]) -> None:
    """Refuse what the action would ignore."""
    if action == "retrain" and number is None:
        raise click.UsageError("retrain needs the number of a cell, counted from 1")
    if action in ("list", "append") and number is not None:
        raise click.UsageError(f"{action} takes no number")
    if action in ("drop", "retrain") and net is not None and ".py:" not in net:
        raise click.UsageError(f"{action}: --net is for runs of your own code (path/to/net.py:function)")
    if action in ("list", "drop") and changes:
        raise click.UsageError(f"{action} trains no cell; leave out --{next(iter(changes)).replace('_', '-')}")


def _list(run: Path, net: str | None, method: str | None, as_json: bool) -> None:
    from edgetrain.report.terminal import show_cells
    from edgetrain.training.edits import list_cells
    from edgetrain.training.run import Run

    with stdout_for_results():
        states = list_cells(Run.open(run, net, method))
    if as_json:
        click.echo(json.dumps(to_builtins(states)))
    else:
        show_cells(states)
    if any(state.state != "ok" for state in states):
        raise click.exceptions.Exit(CorruptError.exit_code)
