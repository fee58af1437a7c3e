"""``edgetrain doctor``: what this machine is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgetrain.cli.options import output_options

EPILOG = "Example: edgetrain doctor --json"


@click.command("doctor", epilog=EPILOG)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path(),
    help="Whose disk to measure; by default the current folder's.",
)
@output_options
def command(folder: Path, as_json: bool) -> None:
    """Show what this machine is: device, memory, disk, versions, and what would go wrong."""
    from edgetrain.report.doctor import examine, show

    facts = examine(folder)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        show(facts)
