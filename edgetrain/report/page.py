"""Pages that a browser opens offline: one file with everything in it, and the figures as PNGs beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgetrain import __version__
from edgetrain.errors import InputError
from edgetrain.record import MemorySeries, RunRecord
from edgetrain.report import figures, profile_figures
from edgetrain.report.drawing import Drawing, png, svg
from edgetrain.report.profile import Point
from edgetrain.report.runs import ShownRun, open_shown, shown_path
from edgetrain.store.atomic import check_name, storage_errors, write_text
from edgetrain.store.run import RunFolder
from edgetrain.units import MIB, show_mb, show_seconds

_UNKNOWN = "unknown"
_REPORT = "report.html"
_LONGEST = 24  # letters of a run's name


def write_report(paths: Sequence[Path], folder: Path | None = None) -> tuple[Path, list[Path], list[str]]:
    """Write the page of some runs.

    Args:
        paths: of their folders.
        folder: where ``report.html`` and ``figures/`` go; by default a single run's own, else ``report/``.

    Returns:
        The page, the PNGs, and what is missing or damaged.

    Raises:
        InputError: a folder is none of a run, or a package is not installed.
        CorruptError: a link is in the place of a file or folder of a run to write to.
        StorageError: the disk refused.
    """
    require_packages()
    if not paths:
        raise InputError("no run to report; name the folders of one or more")
    target = folder or (paths[0] if len(paths) == 1 else Path("report"))
    check_name(target)
    runs = [open_shown(path) for path in paths]
    if folder is None:
        RunFolder(target).refuse_links()
    if (target / _REPORT).is_dir():
        raise InputError(f"{target / _REPORT}: is a folder; expected room for the page")
    names = _distinct(runs)
    known = [(name, shown.record) for name, shown in zip(names, runs, strict=True) if shown.record is not None]
    drawings = figures.of_runs(known) if known else []
    text = _page(
        "runs.html",
        drawings,
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side",
        runs=list(zip(names, runs, strict=True)),
        names=[name for name, _ in known],
        tiles=_tiles(known[0][1]) if len(runs) == 1 and known else [],
        rows=_rows([record for _, record in known]) if known else [],
    )
    pictures = _write_pngs(target / "figures", drawings)
    for path in (target / "figures").glob("*.png"):  # of an earlier report
        if path not in pictures and re.fullmatch(figures.NAMES, path.stem):
            path.unlink(missing_ok=True)
    write_text(target / _REPORT, text)
    return target / _REPORT, pictures, [problem for shown in runs for problem in shown.problems]


def write_profile(
    page: Path | None,
    pictures: Path | None,
    points: Sequence[Point],
    slopes: Sequence[Mapping[str, Any]],
    lived: Mapping[str, Sequence[MemorySeries]],
) -> None:
    """Write the page of a profile, and its figures as PNGs.

    Args:
        page: the page, or ``None``.
        pictures: folder of the PNGs, or ``None``.
        points: of the profile.
        slopes: for each further layer.
        lived: what lives on the device when, by method.

    Raises:
        InputError: a package is not installed.
        StorageError: the disk refused.
    """
    drawings = profile_figures.of_profile(points, lived)
    if pictures is not None:
        _write_pngs(pictures, drawings)
    if page is None:
        return
    measured = any(point.peak_mb is not None for point in points)
    known = [row for row in slopes if row["measured"] is not None or row["predicted"] is not None]
    how = "Measured" if measured else "Predicted by dry runs"
    text = _page("profile.html", drawings, title="Memory profile", how=f"{how}; cells stream one at a time.",
                 points=points, slopes=known)  # fmt: skip
    with storage_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)


def require_packages() -> None:
    """See whether pages and figures can be made.

    Raises:
        InputError: a package is not installed.
    """
    for name in ("matplotlib", "jinja2"):
        if find_spec(name) is None:
            raise InputError(f"pages and figures need {name}, which is not installed; pip install 'edgetrain[report]'")


def _write_pngs(folder: Path, drawings: list[Drawing]) -> list[Path]:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found = [folder / f"{drawing.name}.png" for drawing in drawings]
    for drawing, path in zip(drawings, found, strict=True):
        png(drawing, path)
    return found


def _page(template: str, drawings: list[Drawing], **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=PackageLoader("edgetrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"mib": _mib, "percent": _percent, "number": _number, "seconds": _seconds}
    drawn = [(drawing, Markup(svg(drawing))) for drawing in drawings]
    return str(made.get_template(template).render(version=__version__, drawings=drawn, **values))


def _distinct(runs: Sequence[ShownRun]) -> list[str]:
    """Names by which runs can be told apart, short enough for a figure; folders of the same name are numbered."""
    names = [shown.name if len(shown.name) <= _LONGEST else f"…{shown.name[1 - _LONGEST :]}" for shown in runs]
    names = [f" {name}" if name.startswith("_") else name for name in names]  # a figure would leave it out
    doubled = len(set(names)) < len(names)
    return [f"{number}: {name}" if doubled else name for number, name in enumerate(names, start=1)]


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """What is asked first of a run: label, figure, and what to hold it against."""
    budget = "no budget" if record.budget_mb is None else f"of {_mib(record.budget_mb)} allowed"
    bp = record.bp_predicted_peak_mb
    ratio = f"{bp / record.peak_gpu_mb:.1f} times" if bp and record.peak_gpu_mb else ""
    waited = f"{record.waited_seconds / record.seconds:.1%} of it waiting for data" if record.seconds else ""
    told = record.energy_source or ("no sensor told it" if record.energy_j is None else "")
    found = [
        (
            "test accuracy",
            _percent(record.test_accuracy),
            f"by the vote {record.vote!r}" if record.vote else "by the method's own vote",
        ),
        ("device memory", _mib(record.peak_gpu_mb), budget),
        ("predicted", _mib(record.predicted_peak_mb), "before the run began"),
        ("time", _seconds(record.seconds), waited),
        ("energy", _joules(record.energy_j), told),
    ]
    if bp is not None:
        found.insert(3, ("backpropagation", _mib(bp), f"{ratio} as much, predicted" if ratio else "predicted"))
    return found


def _rows(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    shown: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("folder", lambda r: shown_path(Path(r.run))),
        ("method", lambda r: r.method),
        ("schedule", lambda r: r.schedule or "none: the whole net at once"),
        ("device", lambda r: r.device),
        ("placement", lambda r: r.placement),
        ("cells", lambda r: f"{len(r.cells):,}"),
        ("parameters", lambda r: f"{sum(c.params for c in r.visits):,}"),
        ("test accuracy", lambda r: _percent(r.test_accuracy)),
        ("device budget", lambda r: _mib(r.budget_mb) if r.budget_mb is not None else "none"),
        ("device peak, measured", lambda r: _mib(r.peak_gpu_mb)),
        ("device peak, predicted", lambda r: _mib(r.predicted_peak_mb)),
        ("backpropagation, predicted", lambda r: _mib(r.bp_predicted_peak_mb)),
        ("CUDA context", lambda r: _mib(r.context_mb)),
        ("process, resident", lambda r: _mib(r.peak_host_mb)),
        ("run folder at most", lambda r: _mib(r.disk_mb)),
        ("written in all", lambda r: _mib(r.written_mb)),
        ("time", lambda r: _seconds(r.seconds)),
        ("waited for data", lambda r: _seconds(r.waited_seconds)),
        ("checkpoints", lambda r: _seconds(r.checkpoint_seconds)),
        ("energy", lambda r: _joules(r.energy_j)),
        ("energy of an epoch", lambda r: _joules(r.joules_per_epoch)),
        ("energy of a sample", lambda r: _joules(r.joules_per_sample)),
    ]
    return [(label, [read(record) for record in records]) for label, read in shown]


def _mib(value: float | None, unknown: str = _UNKNOWN) -> str:
    return unknown if value is None else show_mb(value * MIB)


def _percent(value: float | None, unknown: str = _UNKNOWN) -> str:
    return unknown if value is None else f"{100 * value:.2f}%"


def _number(value: float | None, digits: int, unknown: str = _UNKNOWN) -> str:
    return unknown if value is None else f"{value:.{digits}g}"


def _seconds(value: float | None, unknown: str = _UNKNOWN) -> str:
    return unknown if value is None else show_seconds(value)


def _joules(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:,.4g} J" if value >= 0.1 else f"{value * 1e3:,.3g} mJ"
