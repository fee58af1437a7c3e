"""Peak device memory against depth, width and batch size, of methods side by side.

Each point is a net of its own with ``--placement stream``: trained on as many rows as it takes to reach its peak and
to time its steps, or with ``dry`` only predicted, which takes neither memory nor time.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, product
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgetrain.config import Settings
from edgetrain.data.base import DataSet
from edgetrain.errors import InputError
from edgetrain.planning import timelines
from edgetrain.planning.planner import require_fit
from edgetrain.planning.workload import Workload
from edgetrain.record import MemorySeries
from edgetrain.store.atomic import write_text
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.training.methods import method_of
from edgetrain.units import to_mb

FAMILIES = ("mlp", "cnn", "vit")
_TIMED_STEPS = 20


@dataclass(frozen=True)
class Point:
    """One net; memory in MiB, ``None`` where it was not measured.

    Attributes:
        inputs: features (``cnn``: channels) of one sample.
        seconds_per_epoch: of all cells, from the first steps of an epoch.
        moved_mb_per_epoch: rows and latents that come to the device or leave it; cells that stay there do not count.
    """

    method: str
    depth: int
    width: int
    batch_size: int
    peak_mb: float | None
    predicted_mb: float | None
    seconds_per_epoch: float | None
    moved_mb_per_epoch: float | None
    inputs: int | None = None


@dataclass(frozen=True)
class Varied:
    """What is varied: every combination is a point.

    Attributes:
        methods: local rules and baselines.
        family: of the nets, one of ``FAMILIES``.
        depths: numbers of hidden layers (``vit``: of blocks).
        widths: units (``cnn``: channels) of every layer.
        batch_sizes: samples of a step.
    """

    methods: Sequence[str]
    family: str
    depths: Sequence[int]
    widths: Sequence[int]
    batch_sizes: Sequence[int]


def points(settings: Settings, varied: Varied, dry: bool, data: DataSet | None = None) -> Iterator[Point]:
    """The points, one after the other as they are found; what is wrong is said at once.

    Args:
        settings: everything that is not varied.
        varied: see ``Varied``.
        dry: predict only.
        data: a data set given in Python instead of ``settings.data``.

    Raises:
        InputError: a net or a method is wrong; before the first point.
        BudgetError: a net does not fit the stated budget; likewise.
    """
    combined = list(product(varied.methods, varied.widths, varied.batch_sizes, varied.depths))
    asked = _asked(settings, varied, combined)
    for one in asked:
        _check(one, data)
    return (
        _point(one, depth, width, batch, dry, data)
        for (_, width, batch, depth), one in zip(combined, asked, strict=True)
    )


def timelines_of(settings: Settings, varied: Varied, data: DataSet | None = None) -> dict[str, list[MemorySeries]]:
    """What lives on the device when, in each method's visits; of the deepest net that can be drawn.

    Arguments are those of ``points``.
    """
    depth = max((depth for depth in varied.depths if depth <= timelines.DEEPEST), default=min(varied.depths))
    combined = [(method, max(varied.widths), max(varied.batch_sizes), depth) for method in varied.methods]
    found = {}
    for one in _asked(settings, varied, combined):
        job = open_job(one, data=data)
        found[one.method] = timelines.of_run(job.work, plan_job(job))
    return found


def spec(family: str, depth: int, width: int) -> str:
    """The net of a point; transformers have heads of 32 numbers, where that divides their width, and patches of 4.

    Raises:
        InputError: unknown family.
    """
    if family not in FAMILIES:
        raise InputError(f"--family {family!r}; expected one of {', '.join(FAMILIES)}")
    if family == "mlp":
        return f"mlp:{width}x{depth}"
    if family == "cnn":
        return f"cnn:{','.join([str(width)] * depth)}"
    heads = next(count for count in range(max(1, width // 32), 0, -1) if width % count == 0)
    return f"vit:depth={depth},width={width},heads={heads},patch=4"


def slopes(found: Iterable[Point]) -> list[dict[str, Any]]:
    """MiB per additional layer by least squares, of each method, width and batch size with several depths.

    A net of one layer is left out where that layer reads fewer inputs than later ones do.
    """
    rows = []
    for (method, width, batch), group in groupby(
        found, key=lambda point: (point.method, point.width, point.batch_size)
    ):
        listed = [point for point in group if point.depth > 1 or (point.inputs or width) >= width]
        rows.append(
            {
                "method": method,
                "width": width,
                "batch_size": batch,
                "measured": _slope([(point.depth, point.peak_mb) for point in listed]),
                "predicted": _slope([(point.depth, point.predicted_mb) for point in listed]),
            }
        )
    return rows


def write_csv(path: Path, found: Sequence[Point]) -> None:
    """One line for each point.

    Raises:
        StorageError: the disk refused.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Point)])
    writer.writeheader()
    writer.writerows(asdict(point) for point in found)
    write_text(path, text.getvalue())


def _asked(settings: Settings, varied: Varied, combined: Sequence[tuple[str, int, int, int]]) -> list[Settings]:
    asked = [
        _settings(settings, method, varied.family, depth, width, batch) for method, width, batch, depth in combined
    ]
    for one in asked:
        method_of(replace(one, like=None))
    return [_applying(one, varied.methods) for one in asked]


def _settings(settings: Settings, method: str, family: str, depth: int, width: int, batch: int) -> Settings:
    net = None if method == "slp" else spec(family, depth, width)
    return settings.with_values({"method": method, "net": net, "batch_size": batch, "placement": "stream", "epochs": 1})


def _applying(settings: Settings, methods: Sequence[str]) -> Settings:
    """Without a schedule for a baseline beside local rules, which have one; ``like`` the other way round."""
    kinds = {name: method_of(replace(settings, method=name, like=None)) for name in methods}
    baselines = {name for name, kind in kinds.items() if kind.defaults.schedule is None}
    if settings.method in baselines and len(baselines) < len(set(methods)):
        return replace(settings, schedule=None)
    return settings if settings.method in baselines or not baselines else replace(settings, like=None)


def _check(settings: Settings, data: DataSet | None) -> None:
    """Refuse what is wrong. It is planned only if something was stated that a plan may refuse, as that takes longer.

    Raises:
        InputError: a net or a setting is wrong.
        BudgetError: it does not fit.
    """
    job = open_job(settings, data=data)
    if settings.max_gpu_mb is not None or settings.tiles is not None or settings.micro_batch is not None:
        require_fit(plan_job(job))


def _point(settings: Settings, depth: int, width: int, batch: int, dry: bool, data: DataSet | None) -> Point:
    job = open_job(settings, data=data)
    work = job.work
    plan = plan_job(job)
    require_fit(plan)
    peak = seconds = None
    if not dry:
        few = _few_rows(job.data, work.batch_size)
        assert few.train is not None
        # The second full batch finds the optimizer's state on the device.
        epochs = 1 if few.train.rows >= 2 * work.batch_size else 2
        with TemporaryDirectory(prefix="edgetrain-") as folder:
            run = fit(settings.with_values({"epochs": epochs}), Path(folder) / "run", data=few)
        share = few.train.rows * epochs / work.rows
        peak, seconds = run.record.peak_gpu_mb, math.fsum(cell.seconds for cell in run.record.visits) / share
    return Point(
        method=settings.method,
        depth=depth,
        width=width,
        batch_size=batch,
        peak_mb=peak,
        predicted_mb=to_mb(plan.predicted_peak),
        seconds_per_epoch=None if seconds is None else round(seconds, 3),
        moved_mb_per_epoch=to_mb(_moved(work)),
        inputs=work.inputs.shape[0] if settings.net and settings.net.startswith("cnn") else prod(work.inputs.shape),
    )


def _few_rows(data: DataSet, batch_size: int) -> DataSet:
    """The first rows of a data set: some whole batches, and a short last one where the whole set has one."""
    assert data.train is not None
    rows = min(data.train.rows, _TIMED_STEPS * batch_size + data.train.rows % batch_size)
    test = None if data.test is None else data.test.first(batch_size)
    return replace(data, train=data.train.first(rows), test=test)


def _moved(work: Workload) -> int:
    """Bytes of rows and latents that come to the device or leave it in an epoch of every cell."""
    nodes, reads = range(work.depth), work.classifier_reads
    read = sum(len(work.objective.phases) * work.row_bytes_into(index) for index in nodes)
    read += 2 * sum(work.format_into(index + 1).row_bytes for index in reads)  # the classifier's two sweeps
    written = sum(work.row_bytes_into(index + 1) for index in nodes if work.emits(index))
    return work.rows * (read + written)


def _slope(found: list[tuple[int, float | None]]) -> float | None:
    known = [(depth, peak) for depth, peak in found if peak is not None]
    if len({depth for depth, _ in known}) < 2:
        return None
    depths, peaks = np.array(known, np.float64).T
    centred = depths - depths.mean()
    return round(float(centred @ (peaks - peaks.mean()) / (centred @ centred)), 4) + 0.0  # never -0
