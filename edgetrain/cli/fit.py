"""``edgetrain fit``: train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgetrain.cli.options import GroupedCommand, given_settings, output_options, settings_options, stdout_for_results

EPILOG = "Example: edgetrain fit --data mnist --net mlp:1000x2 --method mf --epochs 5 --max-gpu-mb 64"


@click.command("fit", cls=GroupedCommand, epilog=EPILOG)
@settings_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="The run folder; by default a new one in runs/.")
@click.option("--resume", is_flag=True, help="Continue the run in --run-dir.")
@click.option("--force", is_flag=True, help="Replace the run in --run-dir.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's event files into the run folder.")
@click.option("--print-config", is_flag=True, help="Print the resolved profile and train nothing.")
@output_options
def command(
    profile: str | None,
    run_dir: Path | None,
    resume: bool,
    force: bool,
    quiet: bool,
    tensorboard: bool,
    print_config: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a network one cell at a time, within a memory budget.

    Without any flags it trains on the shipped digits, by the quickstart profile.
    """
    settings, given = given_settings(flags, profile)
    if resume and run_dir is None:
        raise click.UsageError("--resume needs --run-dir: the folder of the run to resume")
    if resume and run_dir is not None and not force:
        from edgetrain.training.resuming import resumed_settings

        settings = resumed_settings(run_dir, given, settings, bool(profile or given.keys() & {"data", "net"}))
    if print_config:
        from edgetrain.training.job import with_defaults
        from edgetrain.training.methods import method_of

        click.echo(with_defaults(settings, method_of(settings)).to_toml(), nl=False)
        return
    from edgetrain.report.tensorboard import logged
    from edgetrain.report.terminal import progress_display, show_run
    from edgetrain.training.fit import fit
    from edgetrain.training.resuming import run_folder

    with (
        stdout_for_results(),
        progress_display(quiet) as shown,
        logged(shown, tensorboard) as callback,
        run_folder(run_dir, settings.data, settings.method) as path,
    ):
        run = fit(settings, path, resume=resume, force=force, callback=callback)
    if as_json:
        click.echo(json.dumps(run.record.as_dict()))
    else:
        show_run(run.record)
