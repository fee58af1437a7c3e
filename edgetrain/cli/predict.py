"""``edgetrain predict``: labels for new data."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import click

from edgetrain.cli.options import output_options, stdout_for_results

EPILOG = "Example: edgetrain predict runs/mnist-mf --data new.npz --probabilities --out labels.csv"


@click.command("predict", epilog=EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="A data set's test rows, or an .npz with x.")
@click.option("--probabilities", is_flag=True, help="Also write the probability of each class.")
@click.option("--latents", type=click.Path(path_type=Path), help="Write the last cell's latents to this .npy file.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the table here instead of stdout.")
@click.option("--net", metavar="FILE.py:FUNCTION", help="The net again, for a run of your own modules.")
@click.option("--method", metavar="FILE.py:CLASS", help="The method again, for a run of your own class.")
@click.option("--device", help="auto, cuda, cuda:1, mps or cpu; by default as the run was trained.")
@output_options
def command(
    run: Path,
    data: str,
    probabilities: bool,
    latents: Path | None,
    out: Path | None,
    net: str | None,
    method: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Predict the labels of new data with a finished run, as a CSV table with one line per row."""
    from edgetrain.store.atomic import check_target, write_text
    from edgetrain.training.run import Run

    for target in filter(None, (latents, out)):
        check_target(target)
    with stdout_for_results():
        opened = Run.open(run, net, method)
        scores = opened.probabilities(data, device)
        labels = scores.argmax(1).tolist()
        if latents is not None:
            opened.latents(data, latents, device)
    if as_json:
        text = json.dumps(_object(run, labels, scores.tolist() if probabilities else None))
    else:
        text = _table(opened.shape.names, labels, scores.tolist() if probabilities else None)
    if out is not None:
        write_text(out, text if text.endswith("\n") else text + "\n")
    else:
        click.echo(text, nl=not text.endswith("\n"))


def _object(run: Path, labels: list[int], probabilities: list[list[float]] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"run": str(run), "labels": labels}
    if probabilities is not None:
        found["probabilities"] = probabilities
    return found


def _table(names: tuple[str, ...], labels: list[int], probabilities: list[list[float]] | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = len(probabilities[0]) if probabilities else 0
    header = ["row", "label", *(["name"] if names else []), *(f"p{number}" for number in range(classes))]
    writer.writerow(header)
    for row, label in enumerate(labels):
        named = [names[label]] if names else []
        chances = [f"{chance:.6f}" for chance in probabilities[row]] if probabilities else []
        writer.writerow([row, label, *named, *chances])
    return text.getvalue()
