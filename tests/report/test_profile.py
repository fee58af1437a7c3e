"""``edgetrain profile``: points, slopes and refusals. ``pytest tests/report/test_profile.py``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgetrain.cli.profile import command
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet, Part
from edgetrain.data.layout import Reading
from edgetrain.errors import BudgetError, EdgetrainError, InputError
from edgetrain.report.profile import Point, Varied, points, slopes, spec, write_csv
from edgetrain.training.fit import fit


def data(rows: int = 96, shape: tuple[int, ...] = (12,)) -> DataSet:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (rows + 8, *shape), dtype=np.uint8)
    y = np.arange(rows + 8) % 4
    return from_arrays((x[:rows], y[:rows]), (x[rows:], y[rows:]), reading=Reading("image"))


def found(methods: list[str], depths: list[int], dry: bool = False, batch: int = 32, **more: Any) -> list[Point]:
    settings = Settings().with_values({"threads": 1, "device": "cpu", **more})
    return list(points(settings, Varied(methods, "mlp", depths, [20], [batch]), dry, data()))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 96])  # the second is the whole data set: one step an epoch
def test_what_is_measured_is_what_was_predicted_and_what_a_run_takes(batch: int, tmp_path: Path) -> None:
    measured = found(["mf", "lbp-ae", "bp", "slp"], [1, 3], batch=batch)
    assert [(point.method, point.depth) for point in measured] == [
        (method, depth) for method in ("mf", "lbp-ae", "bp", "slp") for depth in (1, 3)
    ]
    for point in measured:
        assert point.peak_mb == point.predicted_mb
        assert point.seconds_per_epoch is not None
    asked = {"method": "mf", "net": "mlp:20x3", "batch_size": batch, "placement": "stream", "epochs": 2, "threads": 1}
    run = fit(Settings().with_values({**asked, "device": "cpu"}), tmp_path / "run", data=data())
    assert measured[1].peak_mb == run.record.peak_gpu_mb


def test_a_dry_point_is_the_measured_one_without_its_measures() -> None:
    wet, dry = found(["mf", "bp"], [2, 4]), found(["mf", "bp"], [2, 4], dry=True)
    for one, other in zip(wet, dry, strict=True):
        assert asdict(other) == {**asdict(one), "peak_mb": None, "seconds_per_epoch": None}


def test_streamed_cells_do_not_add_up_and_backpropagation_does() -> None:
    steep = {row["method"]: row for row in slopes(found(["mf", "bp"], [2, 3, 6]))}
    assert steep["mf"]["measured"] == steep["mf"]["predicted"] == 0.0
    weights, activations = 16 * (20 * 20 + 20), 4 * 32 * 20  # weights, gradients, Adam's moments; backpropagation's
    assert steep["bp"]["measured"] == pytest.approx((weights + 2 * activations) / (1 << 20), rel=0.4)


def test_slopes_are_those_of_numpy_and_unknown_for_a_single_depth() -> None:
    depths, peaks = [1, 2, 5, 9], [3.0, 4.5, 4.0, 11.0]
    listed = [Point("mf", depth, 8, 4, None, peak, None, None) for depth, peak in zip(depths, peaks, strict=True)]
    listed += [Point("bp", 3, 8, 4, 1.0, 1.0, 1.0, 1.0)]
    first, second = slopes(listed)
    assert first["predicted"] == pytest.approx(np.polyfit(depths, peaks, 1)[0], abs=1e-4)
    assert (first["measured"], second["measured"], second["predicted"]) == (None, None, None)


def test_moved_bytes_are_those_of_the_rows_that_cells_read_and_hand_on() -> None:
    mf, bp = found(["mf", "bp"], [3], dry=True)
    rows, latents = 96 * 12, 4 * 96 * 20
    assert mf.moved_mb_per_epoch == pytest.approx((rows + 4 * latents) / (1 << 20), abs=0.001)
    assert bp.moved_mb_per_epoch == pytest.approx(rows / (1 << 20), abs=0.001)


def test_nets_of_every_family_are_read() -> None:
    settings = Settings().with_values({"threads": 1, "device": "cpu"})
    images = data(shape=(8, 8))
    for family, width in (("mlp", 9), ("cnn", 6), ("vit", 12)):
        assert list(points(settings, Varied(["mf"], family, [1, 2], [width], [32]), True, images))
    assert spec("cnn", 3, 6) == "cnn:6,6,6"


def test_what_is_wrong_is_said_before_the_first_point() -> None:
    for methods, family in ((["mf", "bpp"], "mlp"), (["mf"], "lstm")):
        with pytest.raises(InputError, match=r"did you mean 'bp'|expected one of mlp, cnn, vit"):
            next(points(Settings(), Varied(methods, family, [1], [4], [8]), True, data()))
    with pytest.raises(BudgetError):
        found(["bp"], [8], max_gpu_mb=0.01)


def test_a_flag_that_some_methods_have_no_use_for_is_for_the_others() -> None:
    for flag in ({"schedule": "sequence"}, {"like": "lbp-ae"}):
        assert [point.method for point in found(["mf", "bp"], [2], dry=True, **flag)] == ["mf", "bp"]
    plain, like = (found(["mf", "bp"], [2], dry=True, **flag)[1] for flag in ({}, {"like": "lbp-ae"}))
    assert like.predicted_mb != plain.predicted_mb  # its cells have biases
    for method, flag in (("bp", {"schedule": "sequence"}), ("mf", {"like": "lbp-ae"})):
        with pytest.raises(InputError):
            found([method], [2], dry=True, **flag)


def test_points_as_csv(tmp_path: Path) -> None:
    listed = found(["mf"], [1, 2], dry=True)
    write_csv(tmp_path / "points.csv", listed)
    with (tmp_path / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["depth"], row["peak_mb"]) for row in rows] == [("mf", "1", ""), ("mf", "2", "")]


def test_the_command_prints_a_table_or_one_json_object(tmp_path: Path) -> None:
    words = ["--methods", "mf,bp", "--depths", "2,3", "--widths", "16", "--dry"]
    told = CliRunner().invoke(command, words, catch_exceptions=False)
    assert "mf, width 16, batch 128: 0 MiB per additional layer, predicted" in told.stdout
    told = CliRunner().invoke(command, [*words, "--json", "--csv", str(tmp_path / "p.csv")], catch_exceptions=False)
    object_ = json.loads(told.stdout)
    assert len(object_["rows"]) == 4
    assert object_["slopes_mb_per_layer"][0]["predicted"] == 0.0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 5
    for bad in ("0", "x", "1,,2", "9" * 40, "-1"):
        refused = CliRunner().invoke(command, ["--depths", bad])
        assert refused.exit_code == 2
        assert "expected whole numbers from 1" in refused.output


def test_what_is_wrong_with_a_later_point_is_said_before_the_first() -> None:
    for flags in ({"tiles": 2}, {"max_gpu_mb": 0.01}):
        with pytest.raises(EdgetrainError):
            next(points(Settings().with_values(flags), Varied(["mf", "bp"], "mlp", [1], [64], [32]), True, data()))
    small = data(shape=(1, 8, 8))
    with pytest.raises(InputError, match="at most 3"):
        next(points(Settings(), Varied(["mf"], "cnn", [1, 4], [8], [32]), True, small))


def test_a_slope_of_nothing_is_plain_nothing() -> None:
    flat = [Point("mf", depth, 8, 8, None, peak, None, None) for depth, peak in ((1, 2.00001), (2, 2.0), (4, 2.0))]
    assert str(slopes(flat)[0]["predicted"]) == "0.0"


def test_a_narrower_first_layer_does_not_count_in_the_slope() -> None:
    peaks = {1: 1.0, 2: 5.0, 3: 5.0, 6: 5.0}
    listed = [Point("mf", depth, 8, 8, None, peak, None, None, inputs=4) for depth, peak in peaks.items()]
    assert slopes(listed)[0]["predicted"] == 0.0
    assert slopes([replace(point, inputs=8) for point in listed])[0]["predicted"] > 0.3
    assert slopes(listed[:2])[0]["predicted"] is None


@pytest.mark.parametrize("rest", [0, 7])
def test_a_large_data_set_is_not_read_whole(rest: int, tmp_path: Path) -> None:
    read = 0
    whole = data(rows=4 * 100 + rest)

    def counted(part: Part) -> Part:
        def chunks() -> Iterator[Any]:
            nonlocal read
            for x, y in part.chunks():
                for start in range(0, len(x), 16):
                    read += 1
                    yield x[start : start + 16], y[start : start + 16]

        return replace(part, chunks=chunks)

    settings = Settings().with_values({"threads": 1, "device": "cpu"})
    varied = Varied(["mf", "bp"], "mlp", [2], [20], [4])
    given = replace(whole, train=counted(whole.train), test=counted(whole.test))
    few, all_rows = (list(points(settings, varied, False, given)) for given in (given, whole))
    assert read <= 2 * 2 * (80 / 16 + 2)  # each method reads labels and rows of 20 batches of 4, and a few test rows
    for point in few:
        assert point.peak_mb == point.predicted_mb
    run = fit(
        settings.with_values({"net": "mlp:20x2", "batch_size": 4, "placement": "stream", "epochs": 1}),
        tmp_path / "run",
        data=whole,
    )
    assert few[0].peak_mb == run.record.peak_gpu_mb
    assert [point.moved_mb_per_epoch for point in few] == [point.moved_mb_per_epoch for point in all_rows]


def test_the_command_names_the_files_that_it_wrote(tmp_path: Path) -> None:
    words = ["--methods", "mf", "--depths", "2,3", "--widths", "16", "--dry"]
    files = {"--csv": tmp_path / "p.csv", "--png": tmp_path / "figures", "--html": tmp_path / "p.html"}
    given = [str(word) for pair in files.items() for word in pair]
    told = CliRunner().invoke(command, [*words, *given], catch_exceptions=False)
    for path in files.values():
        assert f"wrote {path}\n" in told.stdout
        assert path.exists()
