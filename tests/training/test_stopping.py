"""Runs that are asked to stop, wherever they stand, and go on. ``pytest tests/training/test_stopping.py``."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from machine import assert_same, data, settings, stopped_after, stopping_after, units

from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.errors import CorruptError, DivergedError, InputError, Stopped, StorageError
from edgetrain.memory import energy
from edgetrain.memory.energy import Sensor
from edgetrain.planning import timelines
from edgetrain.store.atomic import size_of
from edgetrain.store.latents import LatentFile
from edgetrain.store.run import RunFolder
from edgetrain.stream.classifier import Classifier
from edgetrain.training.callbacks import Callback
from edgetrain.training.checkpointing import Checkpoints
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.training.stopping import Stop

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")


class Heard(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# -- anywhere ------------------------------------------------------------------------------------------

RUNS = {
    "mf, separate": {"method": "mf"},
    "mf, sequence": {"method": "mf", "schedule": "sequence"},
    "mf, sequence, resident": {"method": "mf", "schedule": "sequence", "placement": "resident"},
    "mf, separate, resident": {"method": "mf", "placement": "resident"},
    "mf, half precision": {"method": "mf", "schedule": "sequence", "latent_dtype": "uint8"},
    "batch normalisation and dropout": {"method": "mf", "net": "mlp:24,23,17;norm=batch;dropout=0.3"},
    "tiles": {"method": "mf", "schedule": "sequence", "net": "mlp:48,40", "tiles": 2},
    "views": {"method": "mf", "net": "cnn:4,6", "kind": "images", "augment": "flip", "views": 2},
    "trained classifier": {"method": "lbp-dae", "schedule": "sequence"},
    "trained classifier, resident": {"method": "lbp-dae", "schedule": "sequence", "placement": "resident"},
    "two optimizers": {"method": "lbp-gan", "net": "mlp:20,16"},
    "three streams": {"method": "ff", "schedule": "sequence", "kind": "floats"},
    "whole net": {"method": "bp"},
    "ranges": {"method": "mf", "schedule": "sequence", "disk": "least"},
    "ranges, separate": {"method": "lbp-ae", "disk": "least"},
}


def given(case: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    values = {"epochs": 2, "placement": "stream", **case, **more}
    kind, disk = values.pop("kind", "pixels"), values.pop("disk", None)
    asked, rows = settings(values.pop("method"), **values), data(kind).set
    if disk == "least":
        least = plan_job(open_job(asked, data=rows)).least_disk
        asked = asked.with_values({"max_disk_gb": (least + 1) / (1 << 30)})
    return asked, rows


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("every", [3, 7])
def test_a_run_stopped_again_and_again_ends_the_same(
    name: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows = given(RUNS[name])
    whole = fit(asked, tmp_path / "whole", data=rows)
    path, stops = tmp_path / "stopped", 0
    while stops < 40:
        # Finished cells emit their latents again before a run goes on, and may be asked meanwhile.
        monkeypatch.setattr(Stop, "asked", stopping_after(every * (stops + 1)))
        try:
            run = fit(asked, path, data=rows, resume=True)
            break
        except Stopped as stopped:
            stops += 1
            assert stopped.exit_code == 128 + signal.SIGTERM
    assert stops >= 1
    assert_same(units(path), units(tmp_path / "whole"))
    assert run.record.votes == whole.record.votes
    for cell, same in zip(run.record.cells, whole.record.cells, strict=True):
        assert cell.epochs == same.epochs
        assert cell.losses == pytest.approx(same.losses, rel=1e-5)
        assert cell.accuracies == same.accuracies
    assert list((path / "latents").glob("*")) == []


@pytest.mark.parametrize("name", ["mf, sequence", "mf, sequence, resident", "trained classifier", "three streams"])
def test_checkpoints_within_visits_keep_what_the_next_checkpoint_may_need(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows = given(RUNS[name])
    fit(asked, tmp_path / "whole", data=rows)

    def due(self: Checkpoints, share: float) -> bool:
        questions = vars(self).setdefault("questions", {})
        questions[self._number] = questions.get(self._number, 0) + 1
        return bool(questions[self._number] > 6)

    monkeypatch.setattr(Checkpoints, "due", due)
    path, ends, draw = tmp_path / "cut", 0, np.random.default_rng(0)

    class Dies(Callback):
        """Ends the process, as far as the folder is concerned, some visits after a checkpoint."""

        left = 0

        def visited(self, progress: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    dies = Dies()
    while True:
        dies.left = int(draw.integers(2, 5))
        try:
            fit(asked, path, data=rows, resume=True, callback=dies)
            break
        except KeyboardInterrupt:
            ends += 1
            assert ends < 60
    assert ends >= 1
    assert_same(units(path), units(tmp_path / "whole"))


def opened(folder: Path) -> list[str]:
    """The files below ``folder`` that this process holds open."""
    names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [name for name in names if name.startswith(str(folder))]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["mf, separate", "trained classifier", "trained classifier, resident"])
def test_runs_leave_no_file_open(name: str, keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS[name], keep_latents=keep)
    run = fit(asked, tmp_path / "whole", data=rows)
    run.evaluate(rows)
    kept = sorted(path.name for path in (tmp_path / "whole" / "latents").glob("0*"))
    named = ["000.x.rows", "000.y.rows", "001.x.rows", "002.x.rows", "003.x.rows"][: 5 - (name == "mf, separate")]
    assert kept == (named if "resident" not in name else named[:2]) * keep
    stopped_after(9, asked, tmp_path / "stopped", rows)
    assert opened(tmp_path) == []


@pytest.mark.slow
def test_a_second_stop_while_latents_are_emitted_again_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows = given(RUNS["ranges, separate"])
    fit(asked, tmp_path / "whole", data=rows)
    path = tmp_path / "run"
    for questions in range(1, 60):
        if path.exists() and (saved := RunFolder(path).last()) is not None and saved.within is not None:
            stopped_after(0, asked, path, rows, resume=True)  # at once, before it comes to where it stood
        with monkeypatch.context() as patch:
            patch.setattr(Stop, "asked", stopping_after(questions))
            try:
                fit(asked, path, data=rows, resume=True)
                break
            except Stopped:
                pass
    assert_same(units(path), units(tmp_path / "whole"))


def test_a_stop_at_the_last_step_of_a_visit_calls_no_cell_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS["mf, sequence"])
    said = stopped_after(4, asked, tmp_path / "run", rows)
    assert "at step 5 of epoch 1 of cell 1" in said  # of five
    heard = Heard()
    fit(asked, tmp_path / "run", data=rows, resume=True, callback=heard)
    assert [note for note in heard.notes if "zeros" in note] == []


# -- signals and the clock -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def heard_signals() -> Iterator[None]:
    """What runs in the background of a shell ignores SIGINT, and what runs under nohup SIGHUP."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Signals(Callback):
    """Sends this process a signal when a visit ends."""

    def __init__(self, *numbers: int):
        self.numbers, self.notes = list(numbers), list[str]()

    def visited(self, progress: Any) -> None:
        if self.numbers:
            signal.raise_signal(self.numbers.pop(0))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_checkpoints_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    asked, rows = given(RUNS["mf, sequence"])
    before = signal.getsignal(number)
    heard, path = Signals(number), tmp_path / "run"
    with pytest.raises(Stopped, match=f"stopped by {number.name} at step 1 of epoch 1 of cell 2") as stopped:
        fit(asked, path, data=rows, callback=heard)
    assert stopped.value.exit_code == 128 + number
    assert any("a second signal ends at once" in note for note in heard.notes)
    assert any(f"resume with: edgetrain fit --resume --run-dir {path}" in note for note in heard.notes)
    assert signal.getsignal(number) is before
    last = RunFolder(path).last()
    assert last is not None
    assert last.within is not None
    assert last.within.step == 1


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    asked, rows = given(RUNS["mf, sequence"], checkpoint_every=0.0)

    class Twice(Callback):
        def visited(self, progress: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(asked, tmp_path / "run", data=rows, callback=Twice())
    fit(asked, tmp_path / "run", data=rows, resume=True)
    fit(asked, tmp_path / "whole", data=rows)
    assert_same(units(tmp_path / "run"), units(tmp_path / "whole"))


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        asked, rows = given(RUNS["mf, separate"])
        fit(asked, tmp_path / "run", data=rows, callback=Signals(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    asked, rows = given(RUNS["mf, separate"])
    found: list[Any] = []
    before = signal.getsignal(signal.SIGINT)

    class Looks(Callback):
        def visited(self, progress: Any) -> None:
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=lambda: fit(asked, tmp_path / "run", data=rows, callback=Looks()))
    thread.start()
    thread.join()
    assert found
    assert set(found) == {before}


def test_the_time_limit_stops_a_run_and_does_not_stand_in_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows = given(RUNS["mf, separate"], time_limit=1e-6)
    path = tmp_path / "run"
    with pytest.raises(Stopped, match=r"stopped by --time-limit 1e-06 at step 1 of epoch 1 of cell 1"):
        fit(asked, path, data=rows)
    assert "time_limit" not in (path / "config.toml").read_text()
    # The wall clock may jump as it likes, and a machine may sleep: only the monotonic clock is asked.
    monkeypatch.setattr(time, "time", lambda: pytest.fail("asked the wall clock"))
    fit(asked.with_values({"time_limit": None}), path, data=rows, resume=True)


# -- what is never saved or gone on with -----------------------------------------------------------


def test_a_poisoned_weight_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS["mf, separate"], checkpoint_every=0.0)
    save, made = Checkpoints.save, count()

    def poisons(self: Checkpoints, *arguments: Any) -> None:
        if next(made) == 4:
            cell = self._cells._live[0]
            with torch.no_grad():
                next(cell.module.parameters()).view(-1)[3] = torch.inf  # type: ignore[union-attr]
        save(self, *arguments)

    monkeypatch.setattr(Checkpoints, "save", poisons)
    with pytest.raises(DivergedError, match=r"cell 1 \(.*\): cell\..*weight is not finite; try a smaller --lr"):
        fit(asked, tmp_path / "run", data=rows)
    monkeypatch.setattr(Checkpoints, "save", save)
    fit(asked, tmp_path / "run", data=rows, resume=True)
    fit(asked, tmp_path / "whole", data=rows)
    assert_same(units(tmp_path / "run"), units(tmp_path / "whole"))


@pytest.mark.slow
def test_a_poisoned_classifier_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS["trained classifier"], checkpoint_every=0.0)
    state, made = Classifier.state_dict, count()

    def poisons(self: Classifier) -> Any:
        found = state(self)
        if next(made) == 2:
            found.head["0.bias"][1] = torch.nan
        return found

    monkeypatch.setattr(Classifier, "state_dict", poisons)
    with pytest.raises(DivergedError, match=r"the classifier: head\.0\.bias is not finite"):
        fit(asked, tmp_path / "run", data=rows)
    monkeypatch.setattr(Classifier, "state_dict", state)
    fit(asked, tmp_path / "run", data=rows, resume=True)
    fit(asked, tmp_path / "whole", data=rows)
    assert_same(units(tmp_path / "run"), units(tmp_path / "whole"))


def test_a_run_on_a_disk_with_room_for_one_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS["mf, sequence"])
    stopped_after(8, asked, tmp_path / "run", rows)
    needed = plan_job(open_job(asked, data=rows)).disk_bytes
    taken = size_of(tmp_path / "run")
    assert 0 < taken < needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - taken))
    fit(asked, tmp_path / "run", data=rows, resume=True)


def test_spilled_cells_leave_no_scratch_behind(tmp_path: Path) -> None:
    asked, rows = given(RUNS["mf, sequence"], checkpoint_every=0.0, keep_latents=True)
    path = tmp_path / "run"
    fit(asked, path, data=rows)
    assert list(path.glob("scratch/*")) == []


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS["mf, separate"])
    stopped_after(0, asked, tmp_path / "run", rows)
    changed = data("pixels").raw.copy()
    changed[5, 5] ^= 1
    labels, size = data("pixels").labels, rows.train.rows  # type: ignore[union-attr]
    other = from_arrays((changed[:size], labels[:size]), (changed[size:], labels[size:]), reading=Reading("image"))
    with pytest.raises(InputError, match="its training rows are not those that .* was begun with"):
        fit(asked, tmp_path / "run", data=other, resume=True)
    fit(asked, tmp_path / "run", data=rows, resume=True)


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["mf, separate", "mf, sequence"])
def test_latents_damaged_in_flight_are_made_anew(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS[name], checkpoint_every=1e9)
    fit(asked, tmp_path / "whole", data=rows)
    path, heard, read = tmp_path / "run", Heard(), LatentFile.read
    left = [1]

    def damaged(self: LatentFile, *arguments: Any) -> None:
        if left and self.path.name == "002.x.rows":
            left.pop()
            flip(self.path, 7)
        read(self, *arguments)

    monkeypatch.setattr(LatentFile, "read", damaged)
    fit(asked, path, data=rows, callback=heard)
    assert not left
    assert [note for note in heard.notes if "002.x.rows: rows 0 to 69 are not as they were written" in note]
    assert_same(units(path), units(tmp_path / "whole"))


@pytest.mark.parametrize("kind", ["rows", "sums", "weights", "optim"])
def test_damage_to_what_was_saved_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, rows = given(RUNS["mf, sequence"])
    path = tmp_path / "run"
    stopped_after(8, asked, path, rows)
    pattern = {"rows": "latents/001*.rows", "sums": "latents/001*.sums"}
    found = list(path.glob(pattern.get(kind, f"cells/000@*{'.optim' if kind == 'optim' else ''}.safetensors")))
    flip(found[0], -2)
    with pytest.raises(CorruptError, match=found[0].name):
        fit(asked, path, data=rows, resume=True)
    flip(found[0], -2)
    fit(asked, path, data=rows, resume=True)


def test_a_disk_that_is_full_when_a_run_stops_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rows = given(RUNS["mf, sequence"])
    path = tmp_path / "run"
    stopped_after(8, asked, path, rows)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "asked", stopping_after(8))

        def full(self: LatentFile, number: int) -> None:
            raise StorageError(f"{self.path}: no space left on device")

        patch.setattr(LatentFile, "save", full)
        with pytest.raises(StorageError, match="no space left"):
            fit(asked, path, data=rows, resume=True)
    fit(asked, path, data=rows, resume=True)
    fit(asked, tmp_path / "whole", data=rows)
    assert_same(units(path), units(tmp_path / "whole"))


def test_too_many_open_files_are_a_line(tmp_path: Path) -> None:
    asked, rows = given(RUNS["mf, separate"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
    try:
        with pytest.raises((StorageError, OSError), match="oo many open files"):
            fit(asked, tmp_path / "run", data=rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- energy --------------------------------------------------------------------------------------------


def test_energy_of_a_run_in_parts_is_that_of_all_parts(tmp_path: Path) -> None:
    def sensor(joules: float) -> Any:
        asked = count()
        told = Sensor("made up", 1000.0, lambda: joules * (next(asked) == 2))  # once, after the clock was started
        return mock.patch.object(energy, "sensor_of", return_value=told)

    given_, rows = given(RUNS["mf, separate"])
    with sensor(30.0):
        stopped_after(4, given_, tmp_path / "run", rows)
    with sensor(12.0):
        record = fit(given_, tmp_path / "run", data=rows, resume=True).record
    assert (record.energy_j, record.energy_source) == (42.0, "made up")
    assert record.joules_per_epoch == 42.0 / given_.epochs
    assert record.joules_per_sample == 42.0 / given_.epochs / record.rows
    stopped_after(4, given_, tmp_path / "unknown", rows)
    with sensor(12.0):
        record = fit(given_, tmp_path / "unknown", data=rows, resume=True).record
    assert record.energy_j is None


def test_a_run_that_ends_before_its_first_step_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(work: Any, plan: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timelines, "of_run", interrupted)
    asked, rows = given(RUNS["mf, separate"])
    with pytest.raises(KeyboardInterrupt):
        fit(asked, tmp_path / "run", data=rows)
    assert RunFolder(tmp_path / "run").is_free()
