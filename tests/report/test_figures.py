"""Figures hold what the records say. ``pytest tests/report/test_figures.py``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from msgspec import structs

from edgetrain.record import KINDS, CellRecord, MemorySeries, RunRecord
from edgetrain.report import figures
from edgetrain.report.drawing import Drawing, png, svg
from edgetrain.report.figures import of_runs
from edgetrain.report.profile import Point
from edgetrain.report.profile_figures import of_profile

matplotlib = pytest.importorskip("matplotlib")


def cell(number: int, **values: Any) -> CellRecord:
    return CellRecord(
        **{"name": f"linear {number}", "params": 10, "epochs": 2, "losses": [1.0 / number, 0.5 / number],
           "train_loss": 0.5 / number, "test_accuracy": 0.8 + number / 100, "peak_gpu_mb": float(number),
           "predicted_peak_mb": number + 0.25, "seconds": 2.0 * number, "waited_seconds": 0.5, **values}
    )  # fmt: skip


def series(count: int = 1, name: str = "linear", first: int = 1, peak: float = 3.0) -> MemorySeries:
    rows = [[peak / 3] * 3 + [0.0] * 3, [0.5] * 6]
    return MemorySeries(name, count, peak, "aten.mm.default in the backward pass", rows, first)


def record(**values: Any) -> RunRecord:
    run = RunRecord("runs/a", "mf", "separate", "cpu", 0, rows=100, epochs=2)
    run.cells, run.memory, run.bp_memory = (
        [cell(1), cell(2), cell(3)],
        [series(), series(2, first=2)],
        series(name="bp"),
    )
    run.budget_mb, run.peak_gpu_mb, run.predicted_peak_mb, run.bp_predicted_peak_mb = 8.0, 3.0, 3.25, 12.0
    run.seconds, run.waited_seconds, run.checkpoint_seconds = 20.0, 1.5, 0.75
    run.test_accuracy, run.votes = 0.9, {"sum": 0.9, "last": 0.85, "cells": [0.81, 0.82, 0.83]}
    return structs.replace(run, **values)


def drawn(drawing: Drawing) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=drawing.size)
    drawing.draw(figure)
    return figure


def by_name(drawings: list[Drawing]) -> dict[str, Drawing]:
    return {drawing.name: drawing for drawing in drawings}


def lines(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_a_run_has_every_figure() -> None:
    assert list(by_name(of_runs([("a", record())]))) == [
        "budget", "cells", "timeline", "losses", "accuracies", "votes", "time",
    ]  # fmt: skip


def test_figures_hold_the_record_s_numbers() -> None:
    found = by_name(of_runs([("a", record())]))
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in drawn(found["budget"]).axes[0].containers}
    assert bars == {"measured": [3.0], "predicted": [3.25], "backpropagation": [12.0]}
    assert lines(drawn(found["cells"]).axes[0]) == {"measured": [1.0, 2.0, 3.0], "predicted": [1.25, 2.25, 3.25]}
    losses = lines(drawn(found["losses"]).axes[0])
    assert losses == {"cell 1": [1.0, 0.5], "cell 2": [0.5, 0.25], "cell 3": [1 / 3, 0.5 / 3]}
    accuracies = lines(drawn(found["accuracies"]).axes[0])
    assert accuracies["cell alone"] == pytest.approx([81.0, 82.0, 83.0])
    assert accuracies["all cells, by the run's vote"] == [90.0, 90.0]
    parts = {bar.get_label(): [patch.get_width() for patch in bar] for bar in drawn(found["time"]).axes[0].containers}
    assert parts["computing"] == [1.5, 3.5, 5.5, 0.0]
    assert parts["waiting for data"] == [0.5, 0.5, 0.5, 0.0]
    assert parts["checkpoints"] == [0.0, 0.0, 0.0, 0.75]
    assert parts["preparing, evaluating"] == [0.0, 0.0, 0.0, 20.0 - 12.0 - 0.75]
    assert sum(map(sum, parts.values())) == record().seconds


def test_panels_of_a_timeline_have_the_same_scale_and_every_kind() -> None:
    figure = drawn(by_name(of_runs([("a", record())]))["timeline"])
    run, bp = figure.axes
    assert run.get_ylim() == bp.get_ylim()
    assert [area.get_label() for area in run.collections] == list(KINDS)
    tops = [path.vertices[:, 1].max() for area in run.collections for path in area.get_paths()]
    assert max(tops) == pytest.approx(3.0)
    assert [line.get_xdata()[0] for line in run.get_lines() if line.get_linestyle() == ":"] == [1.5, 3.5]  # visits
    assert "3 MiB at aten.mm in the backward pass" in by_name(of_runs([("a", record())]))["timeline"].caption


def test_of_a_thousand_equal_visits_a_few_are_drawn() -> None:
    deep = record(memory=[series(), series(998, first=2), series(first=1000)])
    figure = drawn(by_name(of_runs([("a", deep)]))["timeline"])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["cell 1", "2", "… 999", "1000"]


def test_of_many_different_visits_those_around_the_peak_are_drawn_and_gaps_are_said() -> None:
    visits = [series(first=number, peak=9.0 if number == 40 else 1.5) for number in range(1, 81)]
    drawing = by_name(of_runs([("a", record(memory=visits))]))["timeline"]
    axes = drawn(drawing).axes[0]
    assert "visits are left out" in drawing.caption
    (marker,) = [line for line in axes.get_lines() if line.get_marker() == "v"]
    assert marker.get_ydata()[0] == 9.0
    shown = [text.get_text() for text in axes.get_xticklabels()]
    assert shown[0] == "1"
    assert any(text.startswith("… ") for text in shown)
    assert "visits are left out" not in by_name(of_runs([("a", record())]))["timeline"].caption


def test_two_epochs_of_a_resident_run_name_their_cells() -> None:
    turns = record(memory=[series(first=number) for number in (1, 2, 3, 1, 2, 3)])
    axes = drawn(by_name(of_runs([("a", turns)]))["timeline"]).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cell 1", "2", "3", "1", "2", "3"]


def test_many_runs_with_long_names_leave_room_for_what_is_drawn() -> None:
    many = [(f"{number:02} {'long' * 5}", record()) for number in range(12)]
    for name in ("cells", "losses", "accuracies"):
        drawing = by_name(of_runs(many))[name]
        figure = drawn(drawing)
        figure.set_layout_engine("constrained")
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes.get_position().height * drawing.size[1] > 1.5  # inches
        box = figure.legends[0].get_window_extent()
        assert box.x1 <= figure.bbox.x1 + 1
        assert len(figure.legends[0].get_texts()) == 12
        styles = {(line.get_color(), line.get_marker()) for line in axes.get_lines() if line.get_marker() != "None"}
        assert len(styles) == 12


def test_one_epoch_and_one_cell_stand_at_whole_numbers() -> None:
    single = record(cells=[cell(1, losses=[0.5], epochs=1)])
    found = by_name(of_runs([("a", single)]))
    for name in ("losses", "cells"):
        figure = drawn(found[name])
        figure.draw_without_rendering()
        low, high = figure.axes[0].get_xlim()
        assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [1.0]


def test_a_deep_run_s_figures_stay_readable() -> None:
    deep = record(cells=[cell(number) for number in range(1, 201)])
    found = by_name(of_runs([("a", deep)]))
    assert len(drawn(found["losses"]).legends[0].get_texts()) == 3
    assert found["time"].size[1] < 4
    assert found["cells"].size == by_name(of_runs([("a", record())]))["cells"].size


def test_runs_side_by_side_share_their_figures() -> None:
    found = by_name(of_runs([("a", record()), ("b", record(budget_mb=None, bp_predicted_peak_mb=None))]))
    assert {"timeline-1", "timeline-2"} <= set(found)
    assert {"a", "b"} <= set(lines(drawn(found["cells"]).axes[0]))
    budget = drawn(found["budget"]).axes[0]
    assert [text.get_text() for text in budget.texts] == ["3", "3", "3.25", "3.25", "12", "-"]
    assert [bar.get_width() for bar in drawn(found["time"]).axes[0].containers[0]] == [10.5, 10.5]


def test_what_a_record_does_not_know_has_no_figure() -> None:
    assert list(by_name(of_runs([("a", RunRecord("a", "mf", "separate", "cpu", 0))]))) == ["budget"]
    bare = record(memory=[], votes={}, seconds=0.0, cells=[cell(1, losses=[], peak_gpu_mb=None, test_accuracy=None)])
    assert list(by_name(of_runs([("a", bare)]))) == ["budget"]


def test_losses_that_are_not_finite_are_left_out() -> None:
    broken = record(cells=[cell(1, losses=[1.0, math.nan, math.inf, 0.001]), cell(2)])
    drawing = by_name(of_runs([("a", broken)]))["losses"]
    figure = drawn(drawing)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 0.001
    assert 1.0 < high < 10
    svg(drawing)


@pytest.mark.parametrize("name", ["$x^{", "<script>alert(1)</script>", "%s {0}", "\N{BELL}ä\n漢", "_hidden"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_drawn_as_they_are(name: str) -> None:
    named = record(cells=[cell(1, name=name), cell(2)], memory=[series(name=name)], method=name)
    for drawing in of_runs([(name, named), ("b", record())]):
        text = svg(drawing)
        assert "<script" not in text
        ElementTree.fromstring(text)


def test_an_svg_takes_the_ink_of_its_page_and_loads_nothing() -> None:
    ids: list[str] = []
    for drawing in of_runs([("a", record())]):
        text = svg(drawing)
        assert "currentColor" in text
        assert "#010203" not in text
        assert not re.search(r"(href|src)=\"(?!#)", text.replace("xlink:href", "href"))
        assert not re.search(r"url\((?!#)", text)
        root = ElementTree.fromstring(text)
        own = [part.get("id") for part in root.iter() if part.get("id")]
        assert set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", text)) <= set(own)
        ids += [name for name in own if name is not None]
        assert svg(drawing) == text  # the same bytes again
    assert len(ids) == len(set(ids))


def test_figures_have_units_and_titles() -> None:
    for drawing in [*of_runs([("a", record())]), *of_profile(points(), {"mf": [series()]})]:
        axes = drawn(drawing).axes
        words = " ".join(each.get_xlabel() + " " + each.get_ylabel() for each in axes)
        assert re.search(r"MiB|seconds|%|loss", words), drawing.name
        assert drawing.title
        assert drawing.caption.endswith(".")


def test_a_png_is_a_picture(tmp_path: Path) -> None:
    png(of_runs([("a", record())])[0], tmp_path / "a.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] > 900
    assert pixels[0, 0, :3].tolist() == [1, 1, 1]
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


def points(measured: bool = True) -> list[Point]:
    return [
        Point(method, depth, 100, 32, peak if measured else None, peak + 0.5, 0.25 if measured else None, 7.0)
        for method, step in (("mf", 0.0), ("bp", 4.0))
        for depth, peak in ((1, 4.0), (2, 4.0 + step), (4, 4.0 + 3 * step))
    ]


def test_a_profile_s_figures_hold_its_points() -> None:
    peaks, seconds, timeline = of_profile(points(), {"mf": [series()], "bp": [series(name="bp")]})
    found = lines(drawn(peaks).axes[0])
    assert found["mf"] == [4.0, 4.0, 4.0]
    assert found["bp"] == [4.0, 8.0, 16.0]
    assert len(found) == 4  # with predictions
    assert lines(drawn(seconds).axes[0])["bp"] == [0.25] * 3
    assert [axes.get_title(loc="left") for axes in drawn(timeline).axes] == ["mf", "bp"]
    (dry,) = of_profile(points(measured=False), {})
    assert lines(drawn(dry).axes[0]) == {"mf, predicted": [4.5] * 3, "bp, predicted": [4.5, 8.5, 16.5]}


@pytest.mark.parametrize(("axis", "label"), [("width", "units of a layer"), ("batch_size", "samples of a batch")])
def test_what_is_varied_is_the_axis(axis: str, label: str) -> None:
    varied = [Point("mf", 2, **{"width": 8, "batch_size": 8, axis: size}, peak_mb=1.0, predicted_mb=1.0,
                    seconds_per_epoch=None, moved_mb_per_epoch=None) for size in (8, 16)]  # fmt: skip
    assert drawn(of_profile(varied, {})[0]).axes[0].get_xlabel() == label


def test_wide_ranges_are_logarithmic_with_plain_numbers() -> None:
    deep = [Point("bp", depth, 100, 32, None, 2.0 * depth, None, None) for depth in (1, 10, 1000)]
    figure = drawn(of_profile(deep, {})[0])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "1,000" in [text.get_text() for text in axes.get_xticklabels()]


def test_colours_can_be_told_apart_by_everybody() -> None:
    """Under each kind of colour blindness (Machado et al. 2009, severity 1) any two kinds differ well."""
    sights = {
        "normal": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    colours = [[int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)] for text in figures.KIND_COLOURS.values()]
    for matrix in sights.values():
        seen = np.array(colours) @ np.array(matrix).T
        apart = [np.abs(one - other).max() for row, one in enumerate(seen) for other in seen[:row]]
        assert min(apart) > 0.1
