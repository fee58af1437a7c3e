"""Latents that the disk cannot hold are emitted again or in short visits; no bit of the result changes.

``pytest tests/training/test_small_disks.py``
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from machine import assert_same, units

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.errors import BudgetError
from edgetrain.planning.cut import choose_cut, latents_held, least_room
from edgetrain.planning.schedule import WHOLE
from edgetrain.store.run import RunFolder
from edgetrain.training.config_file import decisions_of, settings_of
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.training.run import Run
from edgetrain.units import ceil_mb

GIB = 1 << 30
ROWS, CLASSES = 300, 4


def table(rows: int = ROWS, width: int = 12) -> DataSet:
    draw = np.random.default_rng(5)
    y = np.arange(rows + 20) % CLASSES
    x = (draw.normal(size=(CLASSES, width))[y] + draw.normal(size=(rows + 20, width))).astype(np.float32)
    return from_arrays((x[:rows], y[:rows]), (x[rows:], y[rows:]))


def asked(method: str, **values: object) -> Settings:
    standard = {"net": "mlp:40,64,24,48", "epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu", "seed": 2}
    return Settings().with_values({"method": method, **standard, **values})


def tight(settings: Settings, share: float = 0.0) -> float:
    """A budget in GiB between the least and what caching everything takes."""
    plan = plan_job(open_job(settings, data=table()))
    assert plan.least_disk < plan.disk_bytes
    return (plan.least_disk + share * (plan.disk_bytes - 1 - plan.least_disk)) / GIB


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("schedule", ["separate", "sequence"])
@pytest.mark.parametrize(
    ("method", "more"),
    [("mf", {}), ("lbp-ae", {}), ("ff", {"classifier_epochs": 2}), ("sll", {"classifier_epochs": 2})],
)
def test_a_small_disk_changes_no_bit_and_is_enough(
    tmp_path: Path, method: str, more: dict[str, object], schedule: str, share: float
) -> None:
    free = asked(method, schedule=schedule, **more)
    small = asked(method, schedule=schedule, max_disk_gb=tight(free, share), **more)
    whole, run = fit(free, tmp_path / "whole", data=table()), fit(small, tmp_path / "small", data=table())
    decided = decisions_of(tmp_path / "small")
    assert decided.ranges > 1 or decided.cached is not None
    assert_same(units(tmp_path / "small"), units(tmp_path / "whole"))
    assert run.record.votes == whole.record.votes
    assert run.record.peak_gpu_mb == run.record.predicted_peak_mb == whole.record.peak_gpu_mb
    assert run.record.latents_mb is not None
    assert whole.record.latents_mb is not None
    assert run.record.latents_mb < whole.record.latents_mb
    job = open_job(small, data=table())
    assert run.record.latents_mb <= ceil_mb(latents_held(job.work, plan_job(job).cut))
    assert run.record.disk_mb <= ceil_mb(int(small.max_disk_gb * GIB))
    for cell, same in zip(run.record.cells, whole.record.cells, strict=True):
        assert cell.epochs == same.epochs
        assert cell.train_accuracy == pytest.approx(same.train_accuracy)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["separate", "sequence"])
@pytest.mark.parametrize("method", ["mf", "lbp-ae"])
def test_a_run_on_a_small_disk_goes_on_from_checkpoints_within_its_visits_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, schedule: str
) -> None:
    free = asked(method, schedule=schedule, epochs=1, checkpoint_every=0.0)
    small = asked(method, schedule=schedule, epochs=1, checkpoint_every=0.0, max_disk_gb=tight(free, 0.4))
    fit(small, tmp_path / "whole", data=table())
    save, path, made = RunFolder.save, tmp_path / "cut", count()

    def saves_and_dies(folder: RunFolder, *arguments: object) -> None:
        save(folder, *arguments)
        if next(made) % 7 == 6:
            raise KeyboardInterrupt

    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", saves_and_dies)
        settings = small
        while stops < 100:
            try:
                fit(settings, path, data=table(), resume=stops > 0)
                break
            except KeyboardInterrupt:
                stops += 1
                settings = settings_of(path)
    if not Run.open(path).record.cells:
        fit(settings, path, data=table(), resume=True)
    assert stops >= 8
    assert_same(units(path), units(tmp_path / "whole"))


def test_a_disk_smaller_than_the_least_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    least = tight(asked("mf"))
    with pytest.raises(BudgetError, match=r"--max-disk-gb .* cannot hold the run folder: .*, at least"):
        fit(asked("mf", max_disk_gb=0.97 * least), tmp_path / "run", data=table())
    assert not (tmp_path / "run").exists()


def test_views_and_kept_latents_are_cached_whole_or_refused(tmp_path: Path) -> None:
    for more in ({"views": 2, "method": "ff"}, {"keep_latents": True}):
        free = asked("mf").with_values(more)
        plan = plan_job(open_job(free, data=table()))
        assert plan.least_disk == plan.disk_bytes
        with pytest.raises(BudgetError, match="--max-disk-gb"):
            fit(free.with_values({"max_disk_gb": 0.9 * plan.disk_bytes / GIB}), tmp_path / "run", data=table())


@pytest.mark.slow
@examples(max_examples=60, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(["mf", "lbp-ae", "ff", "bp"]),
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=7),
    batch=st.integers(1, 200),
    rows=st.integers(20, 300),
    epochs=st.integers(1, 5),
    sequence=st.booleans(),
    share=st.floats(0, 1.2),
)
def test_a_chosen_cut_fits_and_none_is_refused_that_would(
    method: str, widths: list[int], batch: int, rows: int, epochs: int, sequence: bool, share: float
) -> None:
    values = {"net": f"mlp:{','.join(map(str, widths))}", "batch_size": batch, "epochs": epochs}
    if method != "bp":
        values["schedule"] = "sequence" if sequence else "separate"
    work = open_job(asked(method, **values), data=table(rows)).work
    least, most = least_room(work), latents_held(work, WHOLE)
    assert least <= most
    room = int(least + share * (most - least))
    cut = choose_cut(work, room)
    assert cut is not None
    assert latents_held(work, cut) <= room
    assert (cut == WHOLE) == (most <= room)
    if least:
        assert choose_cut(work, least - 1) is None
