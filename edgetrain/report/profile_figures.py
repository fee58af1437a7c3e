"""The figures of profiles: peak memory against depth, width and batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from edgetrain.record import MemorySeries
from edgetrain.report.drawing import (
    COLOURS,
    MARKERS,
    SIZE,
    Drawing,
    legend_above,
    logarithmic,
    numbers_of,
    room_for,
    whole_numbers,
)
from edgetrain.report.figures import timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from edgetrain.report.profile import Point


def of_profile(points: Sequence[Point], lived: Mapping[str, Sequence[MemorySeries]]) -> list[Drawing]:
    """Peak memory, and time where it was measured, against what was varied; what lives when, for each method."""
    axis = next(
        (name for name in ("depth", "width", "batch_size") if len({getattr(point, name) for point in points}) > 1),
        "depth",
    )
    found = [
        _profile(
            points,
            axis,
            "peaks",
            "Peak device memory",
            "MiB",
            lambda point: point.peak_mb,
            lambda point: point.predicted_mb,
        )
    ]
    if any(point.seconds_per_epoch is not None for point in points):
        found.append(
            _profile(
                points, axis, "seconds", "Time of an epoch", "seconds", lambda point: point.seconds_per_epoch, None
            )
        )
    if lived:
        found.append(timeline("timeline", "Device memory over time, by kind", list(lived.items())))
    return found


def _profile(
    points: Sequence[Point],
    axis: str,
    name: str,
    title: str,
    unit: str,
    measured: Callable[[Point], float | None],
    predicted: Callable[[Point], float | None] | None,
) -> Drawing:
    others = [other for other in ("width", "batch_size", "depth") if other != axis]
    varied = [other for other in others if len({getattr(point, other) for point in points}) > 1]

    def key(point: Point) -> str:
        words = [f"{other.replace('_size', '')} {getattr(point, other)}" for other in varied]
        return ", ".join([point.method, *words])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values: list[float] = []
        every = dict.fromkeys(map(key, points))
        for number, (series, colour, marker) in enumerate(zip(every, cycle(COLOURS), cycle(MARKERS), strict=False)):
            own = sorted((point for point in points if key(point) == series), key=lambda point: getattr(point, axis))
            where = [getattr(point, axis) for point in own]
            seen = [measured(point) for point in own]
            told = [None] * len(own) if predicted is None else [predicted(point) for point in own]
            values += [value for value in (*seen, *told) if value is not None]
            # Lines that cover each other stay visible: early ones are broad, and markers are hollow.
            style: dict[str, Any] = {"color": colour, "marker": marker, "mfc": "none", "lw": max(1.2, 3 - 0.6 * number)}
            if any(value is not None for value in seen):
                axes.plot(where, numbers_of(seen), label=series, **style)
                axes.plot(where, numbers_of(told), color=colour, ls="--", lw=3.5, alpha=0.4)
            else:
                axes.plot(where, numbers_of(told), ls="--", label=f"{series}, predicted", **style)
        spread = [getattr(point, axis) for point in points]
        if values and min(values) > 0 and max(values) > 50 * min(values):
            logarithmic(axes, "y")
        else:
            axes.set_ylim(0, 1.08 * max(values, default=1.0))
        if max(spread) > 50 * min(spread):
            logarithmic(axes, "x")
        else:
            whole_numbers(axes)
        axes.set_xlabel({"depth": "layers", "width": "units of a layer", "batch_size": "samples of a batch"}[axis])
        axes.set_ylabel(f"{title.lower()}, {unit}" if name == "seconds" else f"peak, {unit}")
        legend_above(axes, 2)

    dashed = any(measured(point) is not None for point in points) and predicted is not None
    caption = "Each point is a separate net." + (" Thick dashed lines are predictions." if dashed else "")
    labels = [f"{series}, predicted" for series in dict.fromkeys(map(key, points))]
    return Drawing(name, title, caption, draw, (SIZE[0], SIZE[1] + room_for(labels)))
