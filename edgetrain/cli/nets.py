"""``edgetrain nets``: list the families of nets."""

from __future__ import annotations

import json

import click

from edgetrain.cli.options import output_options, print_list

EPILOG = "Example: edgetrain nets"


@click.command("nets", epilog=EPILOG)
@output_options
def command(as_json: bool) -> None:
    """List the families of nets that --net takes, with an example and their options."""
    from edgetrain.nets.spec import NETS

    families = {name: NETS[name] for name in NETS}
    if as_json:
        rows = [
            {"name": name, "example": each.example, "summary": each.summary, "options": sorted(each.options)}
            for name, each in families.items()
        ]
        click.echo(json.dumps(rows))
        return
    print_list(
        "Families of nets",
        [(each.example, f"{each.summary}; options: {', '.join(sorted(each.options))}") for each in families.values()],
    )
    print_list("Your own", [("path/to/net.py:function", "returns a list of modules or an nn.Sequential")])
