"""``edgetrain report``: a page that shows runs at a glance."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from edgetrain.cli.options import output_options

EPILOG = "Example: edgetrain report runs/mnist-mf runs/mnist-lbp-ae --out comparison"


@click.command("report", epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of report.html and figures/; by default the run's own, for several runs report/.",
)
@output_options
def command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Write report.html, which works offline, and its figures as PNG files. Several runs are compared side by side.

    Unfinished and damaged runs are shown as far as they can be read.
    """
    from edgetrain.report.page import write_report

    page, figures, problems = write_report(runs, out)
    if as_json:
        found = {"report": str(page), "figures": [str(path) for path in figures], "problems": problems}
        click.echo(json.dumps(found))
        return
    for problem in problems:
        click.echo(problem, file=sys.stderr)
    click.echo(f"{page}, {len(figures)} figures in {page.parent / 'figures'}")
