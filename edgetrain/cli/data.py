"""``edgetrain data``: list the data sets that are known by name."""

from __future__ import annotations

import json

import click

from edgetrain.cli.options import output_options, print_list

EPILOG = "Example: edgetrain data list"


@click.group("data", epilog=EPILOG)
def command() -> None:
    """The data sets that --data knows by name."""


@command.command("list", epilog=EPILOG)
@output_options
def list_command(as_json: bool) -> None:
    """List the known data sets, and whether their files are on this machine."""
    from edgetrain.data.specs import known_sets

    known = known_sets()
    if as_json:
        click.echo(json.dumps([{"name": each.name, "summary": each.summary, "here": each.here} for each in known]))
        return
    print_list("On this machine", [(each.name, each.summary) for each in known if each.here])
    print_list("Downloaded when first used", [(each.name, each.summary) for each in known if not each.here])
    print_list("Your own", [("path/to/file.npz", "arrays x_train, y_train, x_test, y_test, or x and y")])
