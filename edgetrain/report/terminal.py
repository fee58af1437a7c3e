"""Progress and tables on a terminal; plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from edgetrain.planning.plan import CellPlan, Plan, RunTimes, VisitTime
from edgetrain.planning.words import counted, plan_in_words
from edgetrain.record import KINDS, CellRecord, MemorySeries, RunRecord
from edgetrain.report.profile import Point
from edgetrain.training import callbacks
from edgetrain.training.edits import CellStatus
from edgetrain.training.predictor import Predictions
from edgetrain.training.run import Run
from edgetrain.training.seeds import Seeds
from edgetrain.units import show_mb, show_seconds

_PLAIN_EVERY_S = 2.0
_POINT = "{:>13} {:>6} {:>6} {:>6} {:>12} {:>12} {:>8} {:>12}"  # a profile's rows come one by one, minutes apart


@contextmanager
def progress_display(quiet: bool) -> Iterator[callbacks.Callback]:
    """What shows a run's progress on stderr: a live display on a terminal, else plain lines."""
    if quiet:
        yield callbacks.Callback()
    elif sys.stderr.isatty():
        with LiveProgress() as live:
            yield _Undisturbed(live)
    else:
        yield _Undisturbed(PlainProgress())


class _Undisturbed(callbacks.Callback):
    """Shows what another shows; a terminal that was closed, or a pipe that is not read, does not end the run."""

    def __init__(self, shown: callbacks.Callback):
        self._shown = shown

    def planned(self, plan: Plan, record: RunRecord) -> None:
        with suppress(OSError):
            self._shown.planned(plan, record)

    def note(self, text: str) -> None:
        with suppress(OSError):
            self._shown.note(text)

    def warn(self, text: str) -> None:
        with suppress(OSError):
            self._shown.warn(text)

    def stepped(self, progress: callbacks.Progress) -> None:
        with suppress(OSError):
            self._shown.stepped(progress)

    def visited(self, progress: callbacks.Progress) -> None:
        with suppress(OSError):
            self._shown.visited(progress)

    def finished(self, record: RunRecord) -> None:
        with suppress(OSError):
            self._shown.finished(record)


class PlainProgress(callbacks.Callback):
    """A line for a cell's epoch, at most one every two seconds, and always for its last."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def planned(self, plan: Plan, record: RunRecord) -> None:
        """See ``Callback``."""
        print(f"{_headline(plan, record)}\ndata: {record.input}", file=sys.stderr)

    def note(self, text: str) -> None:
        """See ``Callback``."""
        print(text, file=sys.stderr)

    def stepped(self, progress: callbacks.Progress) -> None:
        """See ``Callback``."""
        if time.monotonic() - self._last >= 5 * _PLAIN_EVERY_S:
            self._print(progress)

    def visited(self, progress: callbacks.Progress) -> None:
        """See ``Callback``."""
        if time.monotonic() - self._last >= _PLAIN_EVERY_S or progress.epoch == progress.epochs - 1:
            self._print(progress)

    def finished(self, record: RunRecord) -> None:
        """See ``Callback``."""

    def _print(self, progress: callbacks.Progress) -> None:
        self._last = time.monotonic()
        parts = [f"{label}: {value}" for label, value in _figures(progress).items()]
        print(f"{_where(progress)}  {', '.join(parts)}", file=sys.stderr)


_REST = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # truncated on a narrow terminal


class LiveProgress(callbacks.Callback):
    """A bar for the run and one for the epoch, with loss, accuracy, memory and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}", style="cyan", markup=False, table_column=_REST),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._run: TaskID | None = None
        self._epoch: TaskID | None = None

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # the terminal may be gone
            self._bars.stop()

    def planned(self, plan: Plan, record: RunRecord) -> None:
        """See ``Callback``."""
        self._console.print(f"{_headline(plan, record)}\ndata: {record.input}", highlight=False)
        self._run = self._bars.add_task("run", figures="", total=1.0)
        self._epoch = self._bars.add_task("preparing the data", figures="", total=None)

    def note(self, text: str) -> None:
        """See ``Callback``."""
        self._console.print(text, highlight=False)

    def stepped(self, progress: callbacks.Progress) -> None:
        """See ``Callback``."""
        if self._run is None or self._epoch is None:
            return
        figures = _figures(progress)
        left = figures.pop("left", "")
        share = (progress.visit + progress.step / max(progress.steps, 1)) / progress.visits
        self._bars.update(self._run, completed=share, figures=f"{left} left" if left else "")
        text = "  ".join(f"{label} {value}" for label, value in figures.items())
        self._bars.update(
            self._epoch,
            description=_where(progress),
            completed=progress.step,
            total=progress.steps,
            figures=text,
        )

    def visited(self, progress: callbacks.Progress) -> None:
        """See ``Callback``."""
        self.stepped(progress)

    def finished(self, record: RunRecord) -> None:
        """See ``Callback``."""


def show_run(record: RunRecord) -> None:
    """The closing table of a run, on stdout."""
    console = _stdout()
    console.print(_cell_table(record))
    votes = ", ".join(
        f"{vote} {accuracy:.4f}" for vote, accuracy in record.votes.items() if isinstance(accuracy, float)
    )
    if record.test_accuracy is not None:
        console.print(f"test accuracy {record.test_accuracy:.4f}  (votes: {votes})")
    if record.validation_votes:
        shares = ", ".join(f"{vote} {accuracy:.4f}" for vote, accuracy in record.validation_votes.items())
        console.print(f"validation accuracy: {shares}; the run predicts by {record.vote}")
    console.print(
        f"device memory: {_mb(record.peak_gpu_mb)} measured, {_mb(record.predicted_peak_mb)} predicted,"
        f" budget {_mb(record.budget_mb, 'none')}; process {_mb(record.peak_host_mb)};"
        f" disk {_mb(record.disk_mb)}, {_mb(record.written_mb)} written",
        soft_wrap=True,
    )
    waited = record.waited_seconds / record.seconds if record.seconds else 0.0
    console.print(
        f"{show_seconds(record.seconds)}, {waited:.1%} of it waiting for data; run folder {_shown_folder(record.run)}",
        soft_wrap=True,
    )
    console.print(_energy_in_words(record), soft_wrap=True)
    for citation in record.citations:
        console.print(f"{record.method}: {citation}", soft_wrap=True)


def show_seeds(found: Seeds) -> None:
    """The runs with several seeds, on stdout."""
    console = _stdout()
    table = Table("seed", "test accuracy", "peak", "time", "run folder", box=None, header_style="bold")
    for record in found.records:
        accuracy = "unknown" if record.test_accuracy is None else f"{record.test_accuracy:.4f}"
        seed = record.run.rpartition("-")[2]
        table.add_row(seed, accuracy, _mb(record.peak_gpu_mb), show_seconds(record.seconds), _shown_folder(record.run))
    console.print(table)
    if found.mean is not None and found.std is not None:
        spread = f"{found.mean:.4f} ± {found.std:.4f}"
        console.print(f"test accuracy {spread} (mean and standard deviation of {len(found.records)} seeds)")


def _energy_in_words(record: RunRecord) -> str:
    epoch, sample = record.joules_per_epoch, record.joules_per_sample
    if record.energy_j is None or epoch is None or sample is None:
        asked = "no readable power sensor" if record.energy_source is None else "the sensor failed during the run"
        return f"energy: unknown, {asked}"
    each = f"{epoch:.3g} J an epoch, {sample * 1e3:.3g} mJ a sample"
    return f"energy {record.energy_j:.4g} J, {each} ({record.energy_source})"


def show_plan(plan: Plan, bp_peak: int | None, times: RunTimes | None, notes: Sequence[str]) -> None:
    """A plan, on stdout, with ``notes`` on how data and net were read."""
    console = _stdout()
    names = ["cell", "parameters", "micro-batch", "tiles", "peak", "latents on disk", *(["time"] if times else [])]
    table = Table(*names, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    each: Sequence[VisitTime | None] = [None] * len(plan.visits) if times is None else times.visits
    for cell, run in groupby(zip(plan.visits, each, strict=True), key=itemgetter(0)):
        table.add_row(*_plan_row(cell, [time for _, time in run]))
    console.print(table)
    sentences = [f"{note[0].upper()}{note[1:]}." for note in notes]
    for line in (*sentences, *plan_in_words(plan, bp_peak, times)):
        console.print(line, soft_wrap=True)


def _plan_row(cell: CellPlan, times: list[VisitTime | None]) -> list[str]:
    """A row for a run of equal cells, so that a thousand stay readable."""
    known = [time for time in times if time is not None]
    return [
        f"{cell.name} (x{len(times)})" if len(times) > 1 else cell.name,
        f"{cell.params:,}",
        str(cell.micro_batch),
        str(cell.tiles),
        show_mb(cell.peak),
        show_mb(cell.latents) if cell.latents else "-",
        *([f"{show_seconds(sum(time.seconds for time in known))} ({known[0].bound})"] if known else []),
    ]


def show_point(point: Point, heading: bool) -> None:
    """One point of a profile, on stdout, as it is found."""
    if heading:
        print(_POINT.format("method", "depth", "width", "batch", "peak", "predicted", "s/epoch", "moved/epoch"))
    seconds = "-" if point.seconds_per_epoch is None else f"{point.seconds_per_epoch:.2f}"
    sizes = [_mb(size, "-") for size in (point.peak_mb, point.predicted_mb)]
    shown = point.method, point.depth, point.width, point.batch_size, *sizes, seconds, _mb(point.moved_mb_per_epoch)
    print(_POINT.format(*shown), flush=True)


def show_slopes(found: Sequence[Mapping[str, Any]]) -> None:
    """What each further layer takes, on stdout."""
    for row in found:
        slope = row["predicted"] if row["measured"] is None else row["measured"]
        if slope is not None:
            kind = "predicted" if row["measured"] is None else "measured"
            where = f"width {row['width']}, batch {row['batch_size']}"
            print(f"{row['method']}, {where}: {slope:g} MiB per additional layer, {kind}")


def show_timelines(lived: Mapping[str, Sequence[MemorySeries]]) -> None:
    """What each method's highest visit holds at its peak, on stdout."""
    for method, visits in lived.items():
        top = max(visits, key=lambda visit: visit.peak_mb)
        sizes = zip(KINDS, max(top.mb, key=sum), strict=True)
        held = ", ".join(f"{kind} {_mb(size)}" for kind, size in sizes if size)
        print(f"{method}: {_mb(top.peak_mb)} at {top.peak_at}, in {top.name!r}: {held}")


def show_votes(run: Run, found: Predictions, per_cell: bool) -> None:
    """Accuracies, on stdout."""
    console = _stdout()
    table = Table("vote", "accuracy", box=None, header_style="bold")
    for vote, accuracy in found.accuracy.items():
        chosen = "chosen on validation rows" if run.settings.vote == "auto" else "the method's own"
        table.add_row(vote, f"{accuracy:.4f}  ({chosen})" if vote == run.vote else f"{accuracy:.4f}")
    if per_cell:
        for number, (cell, accuracy_or_none) in enumerate(zip(run.record.cells, found.cells, strict=False), start=1):
            shown = "has no vote" if accuracy_or_none is None else f"{accuracy_or_none:.4f}"
            table.add_row(f"cell {number}, {cell.name}", shown)
    console.print(table)


def show_cells(states: list[CellStatus]) -> None:
    """A run's cells and their files, on stdout."""
    console = _stdout()
    table = Table("cell", "name", "parameters", "epochs", "test accuracy", "file", "state", box=None)
    table.header_style = "bold"
    for cell in states:
        record = cell.record
        accuracy = "-" if record.test_accuracy is None else f"{record.test_accuracy:.4f}"
        table.add_row(
            str(cell.number), record.name, f"{record.params:,}", str(record.epochs), accuracy, cell.file, cell.state
        )
    console.print(table)


def _stdout() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for a row where there is none."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def _headline(plan: Plan, record: RunRecord) -> str:
    budget = "no budget" if plan.budget is None else f"budget {show_mb(plan.stated_budget)}"
    schedule = f", {record.schedule}" if record.schedule else ""
    return (
        f"{record.method}{schedule}: {counted(len(plan.cells))} on {record.device}, {plan.placement};"
        f" predicted peak {show_mb(plan.predicted_peak)}, {budget}; {_shown_folder(record.run)}"
    )


def _shown_folder(run: str) -> str:
    """A run folder's path, from the current folder on if it is in there."""
    here = Path.cwd()
    return str(Path(run).relative_to(here) if Path(run).is_relative_to(here) else run)


def _where(progress: callbacks.Progress) -> str:
    return f"cell {progress.node + 1}/{progress.nodes} {progress.name}  epoch {progress.epoch + 1}/{progress.epochs}"


def _figures(progress: callbacks.Progress) -> dict[str, str]:
    figures = {"loss": f"{progress.loss:.4f}"}
    if progress.accuracy is not None:
        figures["accuracy"] = f"{progress.accuracy:.4f}"
    allowed = "" if progress.budget is None else f" of {show_mb(progress.budget)}"
    figures["memory"] = f"{show_mb(progress.peak)}{allowed}"
    if progress.left_s is not None:
        figures["left"] = show_seconds(progress.left_s)
    return figures


def _cell_table(record: RunRecord) -> Table:
    table = Table("cell", "parameters", "epochs", "train loss", "test accuracy", "peak", "predicted", "time", box=None)
    table.header_style = "bold"
    for column in table.columns[1:]:
        column.justify = "right"
    rows = record.visits
    for cell in rows:
        table.add_row(*_cells_row(cell))
    return table


def _cells_row(cell: CellRecord) -> list[str]:
    return [
        cell.name,
        f"{cell.params:,}",
        str(cell.epochs),
        "-" if cell.train_loss is None else f"{cell.train_loss:.4f}",
        "-" if cell.test_accuracy is None else f"{cell.test_accuracy:.4f}",
        _mb(cell.peak_gpu_mb),
        _mb(cell.predicted_peak_mb),
        show_seconds(cell.seconds),
    ]


def _mb(value: float | None, unknown: str = "unknown") -> str:
    return unknown if value is None else show_mb(value * (1 << 20))
