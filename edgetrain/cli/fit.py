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
@click.option(
    "--seeds",
    type=click.IntRange(2, 1000),
    metavar="N",
    help="Train N runs with consecutive seeds, each in a folder of its own, and report mean and standard deviation.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's event files into the run folder.")
@click.option("--print-config", is_flag=True, help="Print the resolved profile and train nothing.")
@output_options
def command(
    profile: str | None,
    run_dir: Path | None,
    resume: bool,
    force: bool,
    seeds: int | None,
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
    if seeds is not None and resume and force:
        raise click.UsageError("--resume and --force exclude each other: one keeps the runs, the other removes them")
    may_start = bool(profile or given.keys() & {"data", "net"})
    if resume and run_dir is not None and not force and seeds is None:
        from edgetrain.training.resuming import resumed_settings

        settings = resumed_settings(run_dir, given, settings, may_start)
    if print_config:
        from edgetrain.training.job import with_defaults
        from edgetrain.training.methods import method_of

        click.echo(with_defaults(settings, method_of(settings)).to_toml(), nl=False)
        return
    from edgetrain.report.tensorboard import logged
    from edgetrain.report.terminal import progress_display, show_run, show_seeds
    from edgetrain.training.fit import fit
    from edgetrain.training.resuming import run_folder
    from edgetrain.training.seeds import Seeds, fit_seeds

    with (
        stdout_for_results(),
        progress_display(quiet) as shown,
        logged(shown, tensorboard) as callback,
        run_folder(run_dir, settings.data, settings.method) as path,
    ):
        if seeds is None:
            runs = [fit(settings, path, resume=resume, force=force, callback=callback)]
        else:
            runs = fit_seeds(settings, path, seeds, given, resume=resume, force=force, callback=callback)
    if seeds is not None:
        found = Seeds.of([run.record for run in runs])
        if as_json:
            click.echo(json.dumps(found.as_dict()))
        else:
            show_seeds(found)
    elif as_json:
        click.echo(json.dumps(runs[0].record.as_dict()))
    else:
        show_run(runs[0].record)
