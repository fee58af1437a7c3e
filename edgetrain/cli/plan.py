"""``edgetrain plan``: what a run would take."""

from __future__ import annotations

import json
from typing import Any

import click

from edgetrain.cli.options import GroupedCommand, given_settings, output_options, settings_options, stdout_for_results

EPILOG = "Example: edgetrain plan --data mnist --net mlp:10000x1000 --max-gpu-mb 512"


@click.command("plan", cls=GroupedCommand, epilog=EPILOG)
@settings_options
@output_options
def command(profile: str | None, as_json: bool, **flags: Any) -> None:
    """Show what a run would take, without training: memory, disk, micro-batches, tiles, time, by cell.

    Times need the rates of this machine, which `edgetrain doctor` measures once.
    """
    settings, _ = given_settings(flags, profile)
    from edgetrain.planning.planner import backprop_peak
    from edgetrain.report.terminal import show_plan
    from edgetrain.training.job import open_job, plan_job, times_of
    from edgetrain.training.process import process_state

    with stdout_for_results(), process_state(settings):
        job = open_job(settings)
        plan = plan_job(job)
        bp = backprop_peak(job.work, job.net)
        times = times_of(job, plan)
        _ = plan.min_budget  # cached: finding it runs the user's code, which may print
    if as_json:
        click.echo(json.dumps({"data": job.input, **plan.as_dict(bp, times)}))
    else:
        show_plan(plan, bp, times, [f"data: {job.input}", *job.notes])
