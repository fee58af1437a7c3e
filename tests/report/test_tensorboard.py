"""TensorBoard's own reader finds what the run told. ``pytest tests/report/test_tensorboard.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine import data, settings, stopped_after

import edgetrain
from edgetrain.errors import InputError
from edgetrain.report import tensorboard
from edgetrain.report.tensorboard import logged
from edgetrain.store.run import RunFolder
from edgetrain.training.callbacks import Callback
from edgetrain.training.fit import fit

pytest.importorskip("tensorboard")
ROWS = data("pixels").set
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_scalars_are_the_record_s(tmp_path: Path) -> None:
    asked = settings("mf", net="mlp:24x2", max_gpu_mb=4.0)
    with logged(Callback()) as callback:
        record = fit(asked, tmp_path / "run", data=ROWS, callback=callback).record
    found = scalars(tmp_path / "run")
    for number, cell in enumerate(record.cells, start=1):
        told = found[f"loss/{number:03} {cell.name}"]
        assert [step for step, _ in told] == list(range(1, asked.epochs + 1))
        assert [loss for _, loss in told] == pytest.approx(cell.losses, rel=1e-4)
        assert found[f"training accuracy/{number:03} {cell.name}"][-1][1] == pytest.approx(cell.train_accuracy)
        assert max(size for _, size in found[f"memory/{number:03} {cell.name}, MiB"]) <= (cell.peak_gpu_mb or 0) + 1e-3
    assert found["test accuracy/by cell"] == [
        (number, pytest.approx(cell.test_accuracy)) for number, cell in enumerate(record.cells, start=1)
    ]
    assert found["test accuracy/sum"][0][1] == pytest.approx(record.votes["sum"])
    assert found["memory/budget, MiB"] == [(0, 4.0)]
    assert found["memory/predicted, MiB"][0][1] == pytest.approx(record.predicted_peak_mb)


def test_a_run_that_ends_early_keeps_what_it_told(tmp_path: Path) -> None:
    asked = settings("mf", net="mlp:24x2")
    with logged(Callback()) as callback:
        stopped_after(25, asked, tmp_path / "run", ROWS, callback=callback)
    assert scalars(tmp_path / "run")["loss/001 linear 21-24"]
    with logged(Callback()) as callback:
        fit(asked, tmp_path / "run", data=ROWS, resume=True, callback=callback)
    assert len(scalars(tmp_path / "run")["loss/002 linear 24-24"]) == asked.epochs


def test_logs_change_no_bit_and_go_with_the_run(tmp_path: Path) -> None:
    given = {"net": "mlp:24x2", "data": (ROWS, None), "run_dir": tmp_path / "run"}
    X, y = data("pixels").raw, data("pixels").labels
    models = []
    for logs in (False, True):
        edgetrain.fit(given["net"], (X, y), run_dir=given["run_dir"], epochs=1, tensorboard=logs, force=logs)
        models.append((tmp_path / "run" / "model.safetensors").read_bytes())
        assert (tmp_path / "run" / "tensorboard").exists() == logs
    assert models[0] == models[1]
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.clear()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"edgetrain\[tensorboard\]"), logged(Callback()):
        raise AssertionError
