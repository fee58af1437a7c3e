"""Each mistake gets one line that says what and what to do, its exit code, and leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]

# What is typed, the exit code, and words that the line must hold.
MISTAKES = {
    "unknown data": (["fit", "--data", "mnst"], 2, ["mnst", "mnist"]),
    "missing data file": (["fit", "--data", "nowhere.npz"], 2, ["nowhere.npz"]),
    "empty data file": (["fit", "--data", "empty.npz"], 2, ["empty.npz"]),
    "truncated data file": (["fit", "--data", "truncated.npz"], 4, ["truncated.npz"]),
    "labels not from 0": (["fit", "--data", "labels.npz"], 2, ["labels", "0..C-1"]),
    "nan in the inputs": (["fit", "--data", "nan.npz"], 2, ["nan.npz", "row 7"]),
    "table as images of channels": (
        ["fit", "--data", "table.npz", "--channels", "last"],
        2,
        ["--channels last", "table"],
    ),
    "floats as token ids": (
        ["fit", "--data", "table.npz", "--input", "tokens"],
        2,
        ["table.npz", "float32", "integers"],
    ),
    "input of a known data set": (["plan", "--data", "digits", "--input", "table"], 2, ["--input", "digits"]),
    "unknown input": (["fit", "--input", "video"], 2, ["--input", "video", "tokens"]),
    "unknown method": (["fit", "--method", "mff"], 2, ["mff", "mf"]),
    "unknown net": (["fit", "--net", "resnet:50"], 2, ["resnet:50", "mlp:"]),
    "unknown net option": (["fit", "--net", "mlp:8;colour=1"], 2, ["colour", "bias"]),
    "net that does not fit the data": (["fit", "--data", "table.npz", "--net", "cnn:4"], 2, ["images"]),
    "net with too many poolings": (["fit", "--net", "cnn:4,4,4,4"], 2, ["8x8", "3"]),
    "own net that does not fit": (["fit", "--net", "net.py:wrong"], 2, ["net.py:wrong", "cell 1"]),
    "own net without the function": (["fit", "--net", "net.py:nothing"], 2, ["nothing"]),
    "own net without the file": (["fit", "--net", "no.py:build"], 2, ["no.py"]),
    "wrong flag": (["fit", "--epoch", "3"], 2, ["--epoch"]),
    "wrong flag value": (["fit", "--epochs", "many"], 2, ["--epochs", "many"]),
    "zero epochs": (["fit", "--epochs", "0"], 2, ["--epochs", "at least 1"]),
    "zero budget": (["fit", "--max-gpu-mb", "0"], 2, ["--max-gpu-mb"]),
    "negative budget": (["fit", "--max-gpu-mb", "-5"], 2, ["--max-gpu-mb"]),
    "budget that cannot hold": (["fit", "--max-gpu-mb", "0.01"], 6, ["smallest budget", "MiB"]),
    "host budget that cannot hold": (["fit", "--max-host-mb", "1"], 6, ["--max-host-mb"]),
    "disk budget that cannot hold": (["fit", "--max-disk-gb", "0.0001"], 6, ["--max-disk-gb"]),
    "unknown device": (["fit", "--device", "abacus"], 2, ["abacus", "cpu"]),
    "unknown profile": (["fit", "--profile", "nothing"], 2, ["nothing", "quickstart"]),
    "unknown key in a profile": (["fit", "--profile", "wrong.toml"], 2, ["epoch_count"]),
    "no run to evaluate": (["evaluate", "runs/nothing"], 2, ["runs/nothing"]),
    "no run to predict with": (["predict", "runs/nothing", "--data", "digits"], 2, ["runs/nothing"]),
    "resume without a folder": (["fit", "--resume"], 2, ["--run-dir"]),
    "resume and force": (["fit", "--resume", "--force", "--run-dir", "r"], 2, ["--resume", "--force"]),
    "folder that is a file": (["fit", "--run-dir", "net.py"], 2, ["net.py"]),
    "force over other files": (["fit", "--force", "--run-dir", "others"], 2, ["others", "--force"]),
    "schedule for a baseline": (["fit", "--method", "bp", "--schedule", "separate"], 2, ["--schedule"]),
    "classifier of a method without": (["fit", "--classifier-lr", "1"], 2, ["--classifier-lr"]),
    "like for a local method": (["fit", "--like", "mf"], 2, ["--like"]),
    "micro-batch of a coupled batch": (
        ["fit", "--net", "mlp:8;norm=batch", "--micro-batch", "4"],
        2,
        ["--micro-batch"],
    ),
    "unknown command": (["train"], 2, ["train"]),
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Data sets, nets and profiles with mistakes in them."""
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 5), dtype=np.float32), np.arange(60) % 3
    np.savez(tmp_path / "table.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez(tmp_path / "labels.npz", x_train=x, y_train=y + 1, x_test=x, y_test=y + 1)
    bad = x.copy()
    bad[7, 2] = np.nan
    np.savez(tmp_path / "nan.npz", x_train=bad, y_train=y, x_test=x, y_test=y)
    (tmp_path / "empty.npz").touch()
    (tmp_path / "truncated.npz").write_bytes((tmp_path / "table.npz").read_bytes()[:700])
    (tmp_path / "wrong.toml").write_text("epoch_count = 3\n")
    (tmp_path / "net.py").write_text("from torch import nn\ndef wrong():\n    return [nn.Linear(63, 4)]\n")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").write_text("dear")
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_its_exit_code(mistake: str, edgetrain: Command, files: Path) -> None:
    words, code, said = MISTAKES[mistake]
    before = sorted(path for path in files.rglob("*"))
    done = edgetrain(*words, *(["--quiet"] if words[0] == "fit" else []))
    line = done.stderr.strip()
    assert done.returncode == code, line
    assert done.stdout == ""
    assert "Traceback" not in line
    assert len(line.splitlines()) == 1
    assert all(word in line for word in said), line
    after = sorted(path for path in files.rglob("*") if path.name not in ("__pycache__", "runs"))
    after = [path for path in after if path.suffix != ".pyc"]
    assert after == before


def test_cuda_asked_for_where_there_is_none_is_refused(edgetrain: Command) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = edgetrain("fit", "--device", "cuda")
    assert done.returncode == 2
    assert "cuda" in done.stderr.lower()


def test_a_loss_that_diverges_names_cell_epoch_and_step(edgetrain: Command, tmp_path: Path) -> None:
    done = edgetrain("fit", "--method", "bp", "--net", "mlp:32x3", "--lr", "1e30", "--quiet", "--run-dir", "r")
    assert done.returncode == 7
    assert "cell 1" in done.stderr
    assert "epoch 1" in done.stderr
    assert "step" in done.stderr
    assert not (tmp_path / "r").exists()


def test_an_existing_run_is_refused_resumed_or_replaced(edgetrain: Command, tmp_path: Path) -> None:
    words = ("fit", "--epochs", "1", "--run-dir", "r", "--quiet")
    assert edgetrain(*words).returncode == 0
    record = (tmp_path / "r" / "record.json").read_text()

    refused = edgetrain(*words)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    assert "--force" in refused.stderr

    resumed = edgetrain(*words, "--resume")
    assert resumed.returncode == 0
    assert (tmp_path / "r" / "record.json").read_text() == record

    other = edgetrain("fit", "--epochs", "2", "--run-dir", "r", "--resume")
    assert other.returncode == 2
    assert "epochs" in other.stderr

    replaced = edgetrain("fit", "--epochs", "2", "--run-dir", "r", "--force", "--quiet")
    assert replaced.returncode == 0
    assert (tmp_path / "r" / "record.json").read_text() != record


def test_a_full_disk_is_refused_before_anything_is_written(edgetrain: Command, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this machine does not let us mount a small file system")
    try:
        done = edgetrain("fit", "--run-dir", "small/run", "--quiet")
        assert done.returncode == 3
        assert "free" in done.stderr
        assert list(folder.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro,size=64m", str(folder)], check=True)
        done = edgetrain("fit", "--run-dir", "small/run", "--quiet")
        assert done.returncode == 3
        assert "read-only" in done.stderr
    finally:
        subprocess.run(["umount", str(folder)], check=True)
