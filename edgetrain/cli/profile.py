"""``edgetrain profile``: peak memory against depth, width and batch size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from msgspec import to_builtins

from edgetrain.cli.options import chosen_options, given_settings, output_options

EPILOG = """\b
Example: edgetrain profile --data mnist --methods mf,bp --depths 1,2,4,8 --widths 1000 --dry"""
SHARED = ("data", "schedule", "optimizer", "threads", "device", "max_gpu_mb", "micro_batch", "tiles", "like", "seed")


def _numbers(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    """Whole numbers from 1, with commas between them."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 and int(word) > 0 for word in words):
        raise click.BadParameter(f"{text[:80]!r}: expected whole numbers from 1, such as 1,2,4")
    return list(dict.fromkeys(map(int, words)))


def _make_room(csv_path: Path | None, png: Path | None, html: Path | None) -> None:
    """Create the folders of the output files and check the files' names, before anything is measured.

    Raises:
        InputError: a name cannot be that of a file or folder.
        StorageError: the disk refuses.
    """
    from edgetrain.store.atomic import check_name, check_target, storage_errors

    for path in filter(None, (csv_path, png, html)):
        check_name(path)
    for folder in filter(None, (csv_path and csv_path.parent, png, html and html.parent)):
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    for target in filter(None, (csv_path, html)):
        check_target(target)


@click.command("profile", epilog=EPILOG)
@click.option(
    "--methods",
    default="mf,bp,bp-checkpoint,bp-offload",
    show_default=True,
    help="Local rules and baselines, side by side.",
)
@click.option("--family", default="mlp", show_default=True, help="Family of nets: mlp, cnn or vit.")
@click.option(
    "--depths", callback=_numbers, metavar="N,N,...", default="1,2,4,8", show_default=True, help="Layers (vit: blocks)."
)
@click.option(
    "--widths", callback=_numbers, metavar="N,N,...", default="1000", show_default=True, help="Units per layer."
)
@click.option(
    "--batch-sizes",
    "--batch-size",
    callback=_numbers,
    metavar="N,N,...",
    default="128",
    show_default=True,
    help="Samples per optimizer step.",
)
@click.option("--dry", is_flag=True, help="Only predict the peaks; train nothing.")
@click.option(
    "--csv", "csv_path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the points to this CSV file."
)
@click.option("--png", type=click.Path(path_type=Path, file_okay=False), help="Also write the figures to this folder.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page with figures and points."
)
@click.option("--timeline", is_flag=True, help="Show device memory over time, by kind, for each method.")
@chosen_options(SHARED)
@output_options
def command(
    methods: str,
    family: str,
    depths: list[int],
    widths: list[int],
    batch_sizes: list[int],
    dry: bool,
    csv_path: Path | None,
    png: Path | None,
    html: Path | None,
    timeline: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure or predict the peak device memory of methods, with cells streamed one at a time.

    Slopes are in MiB per additional layer, by least squares.
    """
    settings, _ = given_settings({"data": "digits", **{k: v for k, v in flags.items() if v is not None}}, None)
    from edgetrain.record import KINDS
    from edgetrain.report.page import require_packages, write_profile
    from edgetrain.report.profile import Varied, points, slopes, timelines_of, write_csv
    from edgetrain.report.terminal import show_point, show_slopes, show_timelines

    names = list(dict.fromkeys(name.strip() for name in methods.split(",")))
    if png or html:
        require_packages()
    varied = Varied(names, family, depths, widths, batch_sizes)
    coming = points(settings, varied, dry)
    _make_room(csv_path, png, html)
    found = []
    for point in coming:
        found.append(point)
        if not as_json:
            show_point(point, heading=len(found) == 1)
    steep = slopes(found)
    if csv_path is not None:
        write_csv(csv_path, found)
    lived = timelines_of(settings, varied) if timeline or png or html else {}
    if png or html:
        write_profile(html, png, found, steep, lived)
    if not as_json:
        click.echo("".join(f"wrote {path}\n" for path in (csv_path, png, html) if path), nl=False)
    if as_json:
        values: dict[str, Any] = {"rows": [asdict(point) for point in found], "slopes_mb_per_layer": steep}
        if timeline:
            series = {name: to_builtins(visits) for name, visits in lived.items()}
            values |= {"kinds": KINDS, "timelines": series}
        click.echo(json.dumps(values))
    else:
        show_slopes(steep)
        if timeline:
            show_timelines(lived)
