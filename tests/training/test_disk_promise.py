"""The run folder never holds more than the plan says, whatever the method and however often it checkpoints."""

from __future__ import annotations

from unittest import mock

import pytest
from machine import data, settings

from edgetrain.store import atomic, journal
from edgetrain.store import units as units_module
from edgetrain.store.atomic import size_of
from edgetrain.store.journal import Journal
from edgetrain.store.latents import LatentFile
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.units import MIB


class Watched:
    """Looks at a folder after everything that makes it larger."""

    def __init__(self, path):
        self.path, self.most = path, 0

    def after(self, real):
        def operation(*arguments, **named):
            found = real(*arguments, **named)
            self.most = max(self.most, size_of(self.path))
            return found

        return operation

    def __enter__(self):
        names = [(Journal, "append"), (LatentFile, "allocate"), (atomic, "sync_file"), (units_module, "write_plain")]
        self.patches = [mock.patch.object(owner, name, self.after(getattr(owner, name))) for owner, name in names]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *exception):
        for patch in self.patches:
            patch.stop()


RUNS = {
    "sequence": ("mf", {"schedule": "sequence"}),
    "separate": ("mf", {"schedule": "separate"}),
    "many cells": ("mf", {"net": "mlp:5x60", "epochs": 2}),
    "many epochs": ("mf", {"net": "mlp:5x3", "epochs": 20, "schedule": "sequence"}),
    "classifier": ("lbp-ae", {"schedule": "sequence"}),
    "forward-forward": ("ff", {"schedule": "sequence"}),
    "adversarial": ("lbp-gan", {}),
    "batch normalisation": ("mf", {"net": "mlp:5x20;norm=batch", "batch_size": 35, "micro_batch": None}),
    "resident": ("mf", {"placement": "resident", "schedule": "sequence"}),
    "backpropagation": ("bp", {"net": "mlp:5x60"}),
    "waiting cells on disk": ("mf", {"placement": "stream", "schedule": "sequence", "net": "mlp:23x6"}),
    "kept latents": ("mf", {"keep_latents": True}),
}


LONG = {"many cells", "many epochs", "backpropagation", "batch normalisation"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in RUNS])
def test_the_folder_stays_within_the_plan_and_the_record_tells_its_peak(name, tmp_path):
    method, values = RUNS[name]
    asked, rows = settings(method, **{"epochs": 4, **values, "checkpoint_every": 0.0}), data("pixels").set
    plan = plan_job(open_job(asked, data=rows))
    with Watched(tmp_path / "run") as watched:
        record = fit(asked, tmp_path / "run", data=rows).record
    assert watched.most <= plan.disk_bytes
    assert watched.most / MIB - 0.005 <= record.disk_mb <= watched.most / MIB * 1.05 + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "kept latents"])
def test_the_smallest_disk_that_the_plan_names_is_kept(name, tmp_path):
    method, values = RUNS[name]
    asked, rows = settings(method, **{"epochs": 2, **values, "checkpoint_every": 0.0}), data("pixels").set
    least = plan_job(open_job(asked, data=rows)).least_disk
    limited = asked.with_values({"max_disk_gb": (least + 1) / (1 << 30)})
    with Watched(tmp_path / "run") as watched:
        fit(limited, tmp_path / "run", data=rows)
    assert watched.most <= least + 1


@pytest.mark.slow
def test_a_long_journal_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SLACK", 1000)
    asked, rows = settings("mf", epochs=30, checkpoint_every=0.0, schedule="sequence"), data("pixels").set
    sizes = []
    real = Journal.append

    def append(self, entry):
        real(self, entry)
        sizes.append(self.path.stat().st_size)

    monkeypatch.setattr(Journal, "append", append)
    fit(asked, tmp_path / "run", data=rows)
    assert len(sizes) > 60
    last = len(Journal(tmp_path / "run" / "journal.jsonl").path.read_bytes())
    assert max(sizes) < 1000 + 3 * last
