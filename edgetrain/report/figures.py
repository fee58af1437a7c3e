"""The figures of runs, made from their records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

from edgetrain.record import KINDS, CellRecord, MemorySeries, RunRecord
from edgetrain.report.drawing import (
    COLOURS,
    MARKERS,
    SIZE,
    Drawing,
    grouped_bars,
    ink_of,
    legend_above,
    logarithmic,
    numbers_of,
    room_for,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


KIND_COLOURS = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#9A9A9A"), strict=True))
_FEW = 12  # cells that are shown one by one
NAMES = r"budget|cells|timeline(-\d+)?|losses|evaluations|accuracies|votes|time"  # of runs' figures


Named = Sequence[tuple[str, RunRecord]]


def of_runs(runs: Named) -> list[Drawing]:
    """All figures that the records of some runs, side by side, have something for."""
    found = (
        _by_cell(runs),
        *_timelines(runs),
        _losses(runs),
        _evaluations(runs),
        _accuracies(runs),
        _votes(runs),
        _waits(runs),
    )
    return [_against_budget(runs), *(drawing for drawing in found if drawing is not None)]


def _against_budget(runs: Named) -> Drawing:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = [
            ("measured", COLOURS[0], [record.peak_gpu_mb for _, record in runs]),
            ("predicted", COLOURS[5], [record.predicted_peak_mb for _, record in runs]),
            ("backpropagation", COLOURS[1], [record.bp_predicted_peak_mb for _, record in runs]),
        ]
        bars = [bar for bar in bars if any(size is not None for size in bar[2])]
        grouped_bars(axes, bars, [name for name, _ in runs], "MiB", unknown="unknown" if len(runs) == 1 else "-")
        budgets = [record.budget_mb for _, record in runs]
        for row, budget in enumerate(budgets):
            if budget is not None:
                label = "budget" if row == next(i for i, b in enumerate(budgets) if b is not None) else None
                axes.plot([budget, budget], [row - 0.45, row + 0.45], color=ink_of(axes), lw=2.5, ls=":", label=label)
        legend_above(axes)

    rows = max(1, len(runs))
    return Drawing(
        "budget",
        "Device memory against the budget",
        "Peak device memory of the whole run, predicted and measured, next to the predicted peak of backpropagation"
        " with the same net, batch size and optimizer.",
        draw,
        (SIZE[0], 1.4 + 0.75 * rows),
    )


def _by_cell(runs: Named) -> Drawing | None:
    if not any(cell.peak_gpu_mb is not None for _, record in runs for cell in _visits(record)):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, record), colour, marker in zip(runs, cycle(COLOURS), cycle(MARKERS), strict=False):
            visits = _visits(record)
            numbers = range(1, len(visits) + 1)
            label, predicted_label = (name, "_") if len(runs) > 1 else ("measured", "predicted")
            style: dict[str, Any] = {"color": colour, "marker": marker if len(visits) <= 4 * _FEW else None}
            axes.plot(numbers, numbers_of([cell.peak_gpu_mb for cell in visits]), label=label, **style)
            predicted = numbers_of([cell.predicted_peak_mb for cell in visits])
            style |= {"ls": "--", "lw": 3.5, "alpha": 0.4, "marker": None}
            axes.plot(numbers, predicted, label=predicted_label, **style)
        axes.set_ylabel("peak, MiB")
        sizes = [
            size
            for _, record in runs
            for cell in _visits(record)
            for size in (cell.peak_gpu_mb, cell.predicted_peak_mb)
        ]
        axes.set_ylim(0, 1.08 * max(size for size in sizes if size is not None) or 1.0)
        _cells_below(axes, [record for _, record in runs])
        legend_above(axes)

    return Drawing(
        "cells",
        "Peak by cell",
        "Peak of each cell's visit. The thick dashed line is the prediction. A trained classifier comes last."
        + (" The names label measured peaks." if len(runs) > 1 else ""),
        draw,
        _with_names(runs),
    )


def _timelines(runs: Named) -> list[Drawing]:
    found = []
    for number, (name, record) in enumerate(runs, start=1):
        if record.memory:
            panels = [(f"{record.method}: one visit after the other", record.memory)]
            if record.bp_memory is not None:
                panels.append(("backpropagation on the same net", [record.bp_memory]))
            title = "Device memory over time, by kind" + (f": {name}" if len(runs) > 1 else "")
            found.append(timeline(f"timeline-{number}" if len(runs) > 1 else "timeline", title, panels))
    return found


def timeline(name: str, title: str, panels: Sequence[tuple[str, Sequence[MemorySeries]]]) -> Drawing:
    """Memory by kind in the course of visits, panels to the same scale; at most ``2 * _FEW`` visits of each."""
    shown = [(label, _some(series)) for label, series in panels]
    highest = [max(series, key=lambda each: each.peak_mb) for _, series in panels]
    peaks = [
        f"{label.partition(':')[0]}: {top.peak_mb:,.4g} MiB at {_operation(top.peak_at)}, in {top.name!r}"
        for (label, _), top in zip(panels, highest, strict=True)
    ]

    gaps = "" if all(label[0] != "…" for _, some in shown for _, label in some) else ", and visits are left out at …"

    def draw(figure: Figure) -> None:
        every = figure.subplots(len(shown), 1, sharey=True, squeeze=False)[:, 0]
        for axes, (label, series) in zip(every, shown, strict=True):
            rows = np.concatenate([np.array(each.mb, np.float64).reshape(-1, len(KINDS)) for each, _ in series])
            axes.stackplot(
                np.arange(len(rows)), rows.T, colors=[KIND_COLOURS[kind] for kind in KINDS], labels=KINDS, step="post"
            )
            axes.set_title(label, loc="left")
            axes.set_ylabel("MiB")
            axes.set_xlim(0, max(1, len(rows) - 1))
            _visits_below(axes, series)
            top = int(rows.sum(1).argmax())
            axes.plot([top], [rows[top].sum()], marker="v", color=ink_of(axes), clip_on=False, ls="")
        every[-1].set_xlabel("allocations and releases, in order")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)

    return Drawing(
        name,
        title,
        "The first two steps of each visit and what it emits, as the dry run predicts them; all panels have the same"
        f" scale{gaps}. The peak (marked): {'; '.join(peaks)}.",
        draw,
        (SIZE[0], 1.4 + 1.7 * len(shown)),
    )


def _some(series: Sequence[MemorySeries]) -> list[tuple[MemorySeries, str]]:
    """Visits with their labels: of many equal ones in a row two, of very many the ends and those around the peak."""
    found: list[tuple[MemorySeries, str]] = []
    for each in series:
        last = each.first + each.count - 1
        found.append((each, f"{each.first}"))
        if each.count > 1:
            found.append((each, f"{last}" if each.count == 2 else f"… {last}"))
    if len(found) <= 2 * _FEW:
        return found
    top = max(range(len(found)), key=lambda at: found[at][0].peak_mb)
    ends, around = _FEW // 2, range(top - 2, top + 3)
    kept = sorted({at for at in (*range(ends), *around, *range(len(found) - ends, len(found))) if 0 <= at < len(found)})
    gaps = {at for before, at in pairwise(kept) if at > before + 1}
    return [(found[at][0], f"… {found[at][1].removeprefix('… ')}" if at in gaps else found[at][1]) for at in kept]


def _visits_below(axes: Axes, series: Sequence[tuple[MemorySeries, str]]) -> None:
    edges = np.cumsum([0, *(len(each.mb) for each, _ in series)])
    for edge in edges[1:-1]:
        axes.axvline(edge - 0.5, color=ink_of(axes), lw=0.7, ls=":")
    axes.set_xticks([])
    if len(series) > 1:
        labels = [each.name if each.name == "classifier" else text for each, text in series]
        if len(series) <= _FEW and "classifier" not in labels[:-1]:
            labels[0] = f"cell {labels[0]}"
        step = -(-len(series) // _FEW)
        middles = (edges[:-1] + edges[1:]) / 2
        axes.set_xticks(middles[::step], labels[::step])
        axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)


def _operation(text: str) -> str:
    """``aten.mm.default in the backward pass`` without the overload's name."""
    return re.sub(r"^(aten\.\w+)\.\w+", r"\1", text)


_PALER = " Later cells are paler."
#: Epochs and values of a cell's curve.
Points = tuple[Sequence[int], Sequence[float]]


def _by_epoch(axes: Axes, runs: Named, points: Callable[[CellRecord], Points]) -> None:
    """A curve for each cell over its epochs; cells without points have none."""
    deepest = max(len(_visits(record)) for _, record in runs)
    for (name, record), colour, marker in zip(runs, cycle(COLOURS), cycle(MARKERS), strict=False):
        first = True
        for number, cell in enumerate(_visits(record)):
            epochs, values = points(cell)
            if not values:
                continue
            label = _label(record, number)
            if len(runs) > 1:
                label = name if first else "_"
            elif deepest > _FEW:
                label = label if number in (0, deepest // 2, deepest - 1) else "_"
            first = False
            shade = _shade(number, deepest) if len(runs) == 1 else colour
            mark = marker if len(runs) > 1 else MARKERS[number % len(MARKERS)]
            fade = 1.0 if len(runs) == 1 else 1.0 - 0.6 * number / deepest
            shown = mark if len(values) <= 2 * _FEW else None
            axes.plot(epochs, values, color=shade, marker=shown, alpha=fade, label=label)
    axes.set_xlabel("epoch of the cell")
    whole_numbers(axes, max(max(points(cell)[0], default=1) for _, record in runs for cell in _visits(record)))


def _losses(runs: Named) -> Drawing | None:
    every = [loss for _, record in runs for cell in _visits(record) for loss in cell.losses]
    if not every:
        return None
    values = [loss for loss in every if np.isfinite(loss)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _by_epoch(axes, runs, lambda cell: (range(1, len(cell.losses) + 1), cell.losses))
        if values and min(values) > 0 and max(values) > 20 * min(values):
            logarithmic(axes, "y")
        axes.set_ylabel("mean training loss")
        legend_above(axes)

    return Drawing(
        "losses",
        "Loss of each cell",
        "Training loss of each cell. Losses of cells with different widths or rules cannot be compared."
        + _PALER * (len(runs) > 1),
        draw,
        _with_names(runs),
    )


def _evaluations(runs: Named) -> Drawing | None:
    def points(cell: CellRecord) -> Points:
        known = [each for each in cell.evaluations if each.net_accuracy is not None]
        return [each.epoch for each in known], _percent([each.net_accuracy for each in known])

    def last(record: RunRecord) -> RunRecord:  # of a net that is evaluated as a whole, one curve
        alone = record.schedule == "separate"
        return record if alone else structs.replace(record, cells=record.cells[-1:], classifier=None)

    shown = [(name, last(record)) for name, record in runs if any(points(cell)[1] for cell in record.cells)]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _by_epoch(axes, shown, points)
        axes.set_ylabel("accuracy, %")
        legend_above(axes)

    rows = " and ".join(sorted({str(record.evaluated) for _, record in shown}))
    return Drawing(
        "evaluations",
        "Accuracy in the course of training",
        f"Accuracy on the {rows} rows by the method's vote: of the whole net, or under the separate schedule of the"
        f" cells up to the one that is trained.{_PALER * (len(shown) > 1)}",
        draw,
        _with_names(shown),
    )


def _accuracies(runs: Named) -> Drawing | None:
    def known(record: RunRecord) -> bool:
        return any(cell.test_accuracy is not None for cell in record.cells)

    if not any(sum(cell.test_accuracy is not None for cell in record.cells) > 1 for _, record in runs):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, record), colour, marker in zip(runs, cycle(COLOURS), cycle(MARKERS), strict=False):
            if not known(record):
                continue
            numbers = range(1, len(record.cells) + 1)
            shown = marker if len(numbers) <= 4 * _FEW else None
            label = name if len(runs) > 1 else "cell alone"
            axes.plot(
                numbers, _percent([c.test_accuracy for c in record.cells]), color=colour, marker=shown, label=label
            )
            if record.test_accuracy is not None:
                label = "_" if len(runs) > 1 else "all cells, by the run's vote"
                axes.axhline(100 * record.test_accuracy, color=colour, ls="--", lw=1.1, label=label)
        axes.set_ylabel("test accuracy, %")
        _cells_below(axes, [record for _, record in runs])
        legend_above(axes)

    caption = "Test accuracy of each cell alone. The dashed line is the accuracy of the run, by its own vote."
    return Drawing("accuracies", "Test accuracy by cell", caption, draw, _with_names(runs))


def _votes(runs: Named) -> Drawing | None:
    def votes(record: RunRecord) -> dict[str, float]:
        return {vote: value for vote, value in record.votes.items() if isinstance(value, float)}

    names = list(dict.fromkeys(vote for _, record in runs for vote in votes(record)))
    if len(names) * len(runs) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = []
        for vote, colour in zip(names, cycle(COLOURS), strict=False):
            found = [votes(record).get(vote) for _, record in runs]
            bars.append((vote, colour, [None if value is None else 100 * value for value in found]))
        grouped_bars(axes, bars, [name for name, _ in runs], "test accuracy, %", "{:.2f}", unknown="")
        axes.set_xlim(0, 100)
        legend_above(axes)

    caption = "Test accuracy by vote."
    return Drawing("votes", "Votes", caption, draw, (SIZE[0], 1.3 + 0.3 * len(names) * len(runs)))


def _waits(runs: Named) -> Drawing | None:
    if not any(record.seconds for _, record in runs):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows: list[tuple[str, float, float, float, float]] = []
        for name, record in runs:
            visits = _visits(record)
            if len(runs) == 1 and len(visits) <= _FEW:
                for number, cell in enumerate(visits):
                    rows.append((_label(record, number), cell.seconds - cell.waited_seconds, cell.waited_seconds, 0, 0))
                spent = sum(cell.seconds for cell in visits)
                rest = max(0.0, record.seconds - spent - record.checkpoint_seconds)
                rows.append(("the rest", 0, 0, record.checkpoint_seconds, rest))
            else:
                trained, waited = sum(cell.seconds for cell in visits), record.waited_seconds
                rest = max(0.0, record.seconds - trained - record.checkpoint_seconds)
                rows.append((name, trained - waited, waited, record.checkpoint_seconds, rest))
        left = np.zeros(len(rows))
        places = np.arange(len(rows))
        kinds = ("computing", "waiting for data", "checkpoints", "preparing, evaluating")
        for column, (kind, colour) in enumerate(
            zip(kinds, (COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[7]), strict=True)
        ):
            widths = np.array([max(0.0, row[1 + column]) for row in rows])
            axes.barh(places, widths, 0.7, left=left, color=colour, label=kind)
            left += widths
        axes.set_yticks(places, [row[0] for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        legend_above(axes, 2)

    bars = len(_visits(runs[0][1])) + 1 if len(runs) == 1 and len(_visits(runs[0][1])) <= _FEW else len(runs)
    caption = "How the run spent its time. Waiting for data means that the disk or the host could not keep up."
    return Drawing("time", "What the run waited for", caption, draw, (SIZE[0], 1.5 + 0.28 * bars))


# -- parts ---------------------------------------------------------------------------------------------


def _visits(record: RunRecord) -> list[CellRecord]:
    return record.visits


def _with_names(runs: Named) -> tuple[float, float]:
    """A figure's size with room for the names of several runs."""
    return (SIZE[0], SIZE[1] + (room_for([name for name, _ in runs]) if len(runs) > 1 else 0.0))


def _label(record: RunRecord, number: int) -> str:
    return f"cell {number + 1}" if number < len(record.cells) else "classifier"


def _percent(values: Sequence[float | None]) -> list[float]:
    return [100 * value for value in numbers_of(values)]


def _shade(number: int, of: int) -> Any:
    """Early cells are dark blue, late ones yellow-green; few cells have colours of their own."""
    if of <= len(COLOURS):
        return COLOURS[number]
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * number / max(1, of - 1))


def _cells_below(axes: Axes, records: Sequence[RunRecord]) -> None:
    axes.set_xlabel("cell")
    whole_numbers(axes, max(len(_visits(record)) for record in records))
    if len(records) == 1 and len(_visits(records[0])) <= _FEW:
        visits = _visits(records[0])
        short = [str(number + 1) if number < len(records[0].cells) else "classifier" for number in range(len(visits))]
        axes.set_xticks(range(1, len(visits) + 1), short)
