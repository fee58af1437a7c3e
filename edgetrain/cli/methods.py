"""``edgetrain methods``: list the local rules and baselines."""

from __future__ import annotations

import json
from typing import Any

import click

from edgetrain.cli.options import output_options, print_list

EPILOG = "Example: edgetrain methods"


@click.command("methods", epilog=EPILOG)
@output_options
def command(as_json: bool) -> None:
    """List the methods: local learning rules and baselines."""
    from edgetrain.training.methods import METHODS

    rows: list[dict[str, Any]] = []
    for name in METHODS:
        method = METHODS[name]
        kind = "baseline" if method.defaults.schedule is None else "local rule"
        rows.append({"name": name, "kind": kind, "summary": (method.__doc__ or "").splitlines()[0], **_facts(method)})
    if as_json:
        click.echo(json.dumps(rows))
        return
    for kind, heading in (("local rule", "Local rules"), ("baseline", "Baselines, which train the whole net at once")):
        print_list(heading, [(row["name"], row["summary"]) for row in rows if row["kind"] == kind])


def _facts(method: type) -> dict[str, object]:
    return {"needs": method.needs, "constants": dict(method.constants), "citation": method.citation}  # type: ignore[attr-defined]
