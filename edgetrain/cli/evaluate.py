"""``edgetrain evaluate``: the accuracy of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgetrain.cli.options import output_options, stdout_for_results
from edgetrain.errors import CorruptError

EPILOG = "Example: edgetrain evaluate runs/mnist-mf --per-cell"


@click.command("evaluate", epilog=EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="A data set or .npz with labels; by default the run's own test rows.")
@click.option("--per-cell", is_flag=True, help="Also show the accuracy of each cell.")
@click.option("--net", metavar="FILE.py:FUNCTION", help="The net again, for a run of your own modules.")
@click.option("--method", metavar="FILE.py:CLASS", help="The method again, for a run of your own class.")
@click.option("--device", help="auto, cuda, cuda:1, mps or cpu; by default as the run was trained.")
@output_options
def command(
    run: Path, data: str | None, per_cell: bool, net: str | None, method: str | None, device: str | None, as_json: bool
) -> None:
    """Measure the accuracy of a finished run by every vote it has.

    If a cell is damaged, the cells before it predict, and the exit code is 4.
    """
    from edgetrain.report.terminal import show_votes
    from edgetrain.training.run import Run

    with stdout_for_results():
        opened = Run.open(run, net, method)
        found = opened.evaluate(data, device)
    click.echo(f"evaluated {found.data}", err=True)
    if as_json:
        votes = {**found.accuracy, "cells": found.cells}
        accuracy = found.accuracy.get(opened.vote)
        about = {"run": str(run), "data": found.data, "rows": found.rows, "test_accuracy": accuracy, "votes": votes}
        click.echo(json.dumps({**about, "missing": found.missing} if found.missing else about))
    else:
        show_votes(opened, found, per_cell)
    if found.missing:
        raise click.exceptions.Exit(CorruptError.exit_code)
