"""A run that fails before it trains leaves what was in its folder as it was."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from machine import data, settings

from edgetrain.errors import BudgetError, CorruptError, InputError, StorageError
from edgetrain.store.run import RunFolder
from edgetrain.training import prepared
from edgetrain.training.fit import fit
from edgetrain.training.run import Run


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def good(kind="floats"):
    return data(kind).set


def bad(values="not finite"):
    """A data set of which the last training row, or the last test row, is bad."""
    part_name = "test" if values == "test" else "train"
    found = good()
    part = getattr(found, part_name)

    def chunks():
        for x, y in part.chunks():
            x = x.copy()
            x[-1] = np.nan
            yield x, y

    def short():
        raise CorruptError("data: truncated")
        yield

    return replace(found, **{part_name: replace(part, chunks=short if values == "truncated" else chunks)})


def full_disk(*arguments):
    raise StorageError("disk: no space left on device")


FAILURES = {
    "not finite": (InputError, {}, bad),
    "test rows": (InputError, {}, lambda: bad("test")),
    "truncated": (CorruptError, {}, lambda: bad("truncated")),
    "budget": (BudgetError, {"max_gpu_mb": 1e-5}, good),
    "disk budget": (BudgetError, {"max_disk_gb": 1e-8}, good),
    "net": (InputError, {"net": "cnn:4,4,4,4"}, good),
    "disk": (StorageError, {}, good),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("kept", [False, True])
def test_force_leaves_the_old_run_where_the_new_one_does_not_begin(tmp_path, monkeypatch, name, kept):
    error, values, rows = FAILURES[name]
    path = tmp_path / "run"
    fit(settings("mf", keep_latents=kept), path, data=good())
    before = snapshot(path)
    if name == "disk":
        monkeypatch.setattr(prepared, "prepare", full_disk)
    with pytest.raises(error):
        fit(settings("mf", **values), path, data=rows(), force=True)
    assert snapshot(path) == before
    assert Run.open(path).record.test_accuracy is not None


@pytest.mark.parametrize("name", [name for name in FAILURES if name != "disk"])
@pytest.mark.parametrize("existing", ["", "run", "deep", "deep/er/run"])
def test_an_empty_folder_stays_and_a_new_one_goes_when_a_run_fails(tmp_path, name, existing):
    error, values, rows = FAILURES[name]
    path = tmp_path / ("deep/er/run" if "deep" in existing else "run")
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error):
        fit(settings("mf", **values), path, data=rows())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", ["mf", "bp"])
def test_force_gives_the_bits_of_a_new_run(tmp_path, method):
    new = fit(settings(method), tmp_path / "new", data=good())
    fit(settings("mf", seed=8, keep_latents=True), tmp_path / "old", data=good())
    fit(settings(method), tmp_path / "old", data=good(), force=True)
    assert not (tmp_path / "old" / "latents").exists()
    name = "cells/000.safetensors"
    assert (tmp_path / "old" / name).read_bytes() == (new.path / name).read_bytes()
    assert RunFolder(tmp_path / "old").is_finished()


def test_a_folder_whose_name_is_not_valid_utf8_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"r\xff")
    for resume, force in [(False, False), (True, False), (False, True)]:
        with pytest.raises(InputError, match="not valid UTF-8"):
            fit(settings("mf"), path, data=good(), resume=resume, force=force)
    with pytest.raises(InputError, match="not valid UTF-8"):
        fit(settings("mf"), path / "below", data=good())
    assert list(tmp_path.iterdir()) == []
