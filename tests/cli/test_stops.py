"""Signals, time limits, two processes and full disks, as the shell sees them. ``pytest tests/cli/test_stops.py``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgetrain.store.run import RunFolder

RUN = ["--net", "mlp:64x2", "--epochs", "60", "--schedule", "sequence", "--threads", "1", "--run-dir", "run"]


def started(folder: Path, *more: str, words: list[str] = RUN) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("EDGETRAIN_")}
    command = [sys.executable, "-m", "edgetrain", "fit", *words, *more]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=_heard,
    )  # fmt: skip


def _heard() -> None:
    """What runs in the background of a shell ignores SIGINT, what runs under nohup SIGHUP, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def once_it_trains(child: subprocess.Popen[str], run: Path, at_checkpoint: bool = False) -> None:
    """Wait until the run's training is under way."""
    limit = time.monotonic() + 60
    while not (list(run.glob("latents/001*.rows")) and (not at_checkpoint or RunFolder(run).last())):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What comes of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    child = started(folder, "--quiet")
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return cells(folder / "run")


def cells(run: Path) -> bytes:
    """The bytes of every cell's files, optimizers included."""
    assert (run / "model.safetensors").is_file()
    return b"".join(path.read_bytes() for path in sorted((run / "cells").iterdir()))


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_checkpoints_says_how_to_go_on_and_the_code_is_the_shells(
    number: signal.Signals, code: int, whole: bytes, tmp_path: Path
) -> None:
    child = started(tmp_path)
    once_it_trains(child, tmp_path / "run")
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (code, "")
    *_, note, last = err.strip().splitlines()
    assert note == "the newest checkpoint is kept; resume with: edgetrain fit --resume --run-dir run"
    assert last.startswith(f"edgetrain: stopped by {number.name} at step ")
    assert RunFolder(tmp_path / "run").last() is not None
    child = started(tmp_path, "--resume", words=["--run-dir", "run"])
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert cells(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["terminal", "pipe"])
def test_a_run_whose_terminal_is_gone_still_checkpoints(gone: str, whole: bytes, tmp_path: Path) -> None:
    ours, theirs = os.openpty() if gone == "terminal" else os.pipe()
    env = {name: value for name, value in os.environ.items() if not name.startswith("EDGETRAIN_")}
    child = subprocess.Popen(
        [sys.executable, "-m", "edgetrain", "fit", *RUN], cwd=tmp_path, env=env, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=_heard,
    )  # fmt: skip
    os.close(theirs)
    limit = time.monotonic() + 60
    while not list((tmp_path / "run").glob("latents/001*.rows")):
        assert child.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.close(ours)
    child.send_signal(signal.SIGHUP)
    assert child.wait(60) == 129
    second = started(tmp_path, "--resume", words=["--run-dir", "run"])
    _, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "resuming at step" in err
    assert cells(tmp_path / "run") == whole


@pytest.mark.slow
def test_the_time_limit_stops_as_sigterm_does(whole: bytes, tmp_path: Path) -> None:
    child = started(tmp_path, "--time-limit", "0.2")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143
    assert "stopped by --time-limit 0.2 at step " in err.splitlines()[-1]
    child = started(tmp_path, "--resume", words=["--run-dir", "run"])
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert cells(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_second_process_is_refused_at_once_and_a_dead_one_holds_no_lock(tmp_path: Path) -> None:
    child = started(tmp_path, "--checkpoint-every", "0.1")
    once_it_trains(child, tmp_path / "run", at_checkpoint=True)
    os.kill(child.pid, signal.SIGSTOP)  # it holds the lock for as long as we like
    try:
        for words in (["--run-dir", "run", "--resume"], [*RUN, "--force"]):
            second = started(tmp_path, words=words)
            _, err = second.communicate(timeout=60)
            assert second.returncode == 5, err
            assert err.splitlines()[-1] == "edgetrain: run: another edgetrain works in this run folder; wait for it"
    finally:
        os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    third = started(tmp_path, "--resume", words=["--run-dir", "run"])
    _, err = third.communicate(timeout=120)
    assert third.returncode == 0, err


@pytest.mark.slow
def test_of_two_processes_that_begin_at_once_one_runs_with_its_own_settings(tmp_path: Path) -> None:
    children = [started(tmp_path, "--quiet", "--seed", seed) for seed in ("1", "2")]
    ends = [(child.communicate(timeout=120)[1], child.returncode) for child in children]
    codes = [code for _, code in ends]
    assert codes in ([0, 5], [5, 0], [0, 2], [2, 0]), ends
    seed = 1 + codes.index(0)
    assert f"seed = {seed}\n" in (tmp_path / "run" / "config.toml").read_text()


# -- a disk that is really full ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB; skipped where none can be mounted."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run_is_a_line_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, whole: bytes
) -> None:
    child = started(small_disk, "--checkpoint-every", "0.1")
    once_it_trains(child, small_disk / "run", at_checkpoint=True)
    fill = small_disk / "somebody else's"
    with fill.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    _, err = child.communicate(timeout=120)
    *_, note, last = err.strip().splitlines()
    assert child.returncode == 3, err
    assert "no space left on device" in last
    assert last.startswith("edgetrain: run/")
    assert "resume with: edgetrain fit --resume" in note
    fill.unlink()
    child = started(small_disk, "--resume", words=["--run-dir", "run"])
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert cells(small_disk / "run") == whole


def test_a_disk_too_small_from_the_start_is_refused_and_nothing_is_left(small_disk: Path) -> None:
    child = started(small_disk, "--net", "mlp:500x2")
    _, err = child.communicate(timeout=60)
    assert child.returncode == 3
    assert "free, the run needs" in err.splitlines()[-1]
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_prediction_that_is_stopped_leaves_no_temporary_files(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    child = started(tmp_path, "--quiet", words=["--net", "mlp:8x1", "--epochs", "1", "--run-dir", "run"])
    child.communicate(timeout=120)
    assert child.returncode == 0
    np.savez(tmp_path / "rows.npz", x=np.zeros((400_000, 8, 8), np.uint8))
    command = [sys.executable, "-m", "edgetrain", "predict", "run", "--data", "rows.npz", "--out", "labels.csv"]
    env = {**os.environ, "TMPDIR": str(scratch)}
    child = subprocess.Popen(command, cwd=tmp_path, env=env, preexec_fn=_heard, stderr=subprocess.PIPE)
    limit = time.monotonic() + 60
    while not list(scratch.glob("edgetrain-*/*")):
        assert child.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err.strip()) == (code, b"edgetrain: stopped")
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "labels.csv").exists()
