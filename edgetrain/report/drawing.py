"""Drawings by matplotlib: as SVG for a page of either theme, and as PNG.

In an SVG all ink is ``currentColor``, so that one drawing serves light and dark pages. Colours are those of Okabe
and Ito, which colour-blind people can tell apart; lines differ in their markers too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgetrain.store.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = "osD^vPX"  # one less than colours, so that pairs of both repeat late
_FEW_TICKS = 12
_LONG_LABEL = 20  # letters
_INK = "#010203"  # stands for currentColor
SIZE = (4.3, 3.0)  # inches: what a phone shows without making letters too small
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # names are the user's
    "svg.hashsalt": "edgetrain",
    "figure.constrained_layout.use": True,
}
_INKED = (
    "text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color",
    "hatch.color",
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Attributes:
        name: of its file.
        title: what it shows.
        caption: how to read it, in a sentence or two.
        draw: draws on an empty figure.
        size: in inches.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = SIZE


def svg(drawing: Drawing) -> str:
    """The drawing as an ``<svg>`` element that takes the ink of its surroundings."""
    target = io.StringIO()
    _drawn(
        drawing, _INK, lambda figure: figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    )
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    return _own_names(text, drawing.name)


def png(drawing: Drawing, path: Path) -> None:
    """Write the drawing as a PNG on white.

    Raises:
        StorageError: the disk refused.
    """
    target = io.BytesIO()
    _drawn(drawing, "#222222", lambda figure: figure.savefig(target, format="png", dpi=220, facecolor="white"))
    write_bytes(path, target.getvalue())


def _drawn(drawing: Drawing, ink: str, save: Callable[[Figure], None]) -> None:

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, **dict.fromkeys(_INKED, ink)}
    with rc_context(style):
        figure = Figure(figsize=drawing.size)
        drawing.draw(figure)
        save(figure)


def _own_names(text: str, name: str) -> str:
    """Ids of a drawing's parts are its own, so that several can stand on one page."""
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title" ', 1)


# -- parts of drawings ----------------------------------------------------------------------------------


def numbers_of(values: Sequence[float | None]) -> list[float]:
    """Values with gaps (NaN) where they are unknown."""
    return [float("nan") if value is None else value for value in values]


def ink_of(axes: Axes) -> Any:
    """The colour of all that is not data."""
    return axes.xaxis.label.get_color()


def grouped_bars(
    axes: Axes,
    bars: Sequence[tuple[str, str, Sequence[float | None]]],
    names: list[str],
    unit: str,
    text: str = "{:,.4g}",
    unknown: str = "unknown",
) -> None:
    """Horizontal bars, for each name one of each kind, with their values."""
    height = 0.8 / max(1, len(bars))
    for row, (label, colour, values) in enumerate(bars):
        places = np.arange(len(names)) - 0.4 + height * (row + 0.5)
        drawn = axes.barh(places, [value or 0.0 for value in values], height * 0.9, color=colour, label=label)
        axes.bar_label(drawn, [unknown if value is None else text.format(value) for value in values], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.18)
    axes.set_xlabel(unit)


def whole_numbers(axes: Axes, last: int | None = None) -> None:
    """Ticks of the x axis stand at whole numbers; it goes from 1 to ``last``, if that is given."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if last is not None and last <= _FEW_TICKS:
        axes.set_xlim(0.5, last + 0.5)
        axes.set_xticks(range(1, last + 1))


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_above(axes: Axes, columns: int = 2) -> None:
    """Explain what is drawn, above it, in as many columns as long labels leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > _LONG_LABEL else columns
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def room_for(labels: Sequence[str]) -> float:
    """Inches that a legend of these labels needs beyond two rows."""
    rows = len(labels) if max(map(len, labels), default=0) > _LONG_LABEL else -(-len(labels) // 2)
    return 0.17 * max(0, rows - 2)
