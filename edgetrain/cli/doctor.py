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
    help="A folder on the disk to measure; by default the current folder.",
)
@output_options
def command(folder: Path, as_json: bool) -> None:
    """Check this machine: device, memory, disk, speed, versions, and possible problems."""
    from edgetrain.report.doctor import examine, show

    facts = examine(folder)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        show(facts)
