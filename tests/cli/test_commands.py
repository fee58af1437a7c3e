"""The commands, end to end, on the shipped digits."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from machine import begin

from edgetrain import api
from edgetrain.config import Settings
from edgetrain.errors import InputError
from edgetrain.store.run import RunFolder

Command = Callable[..., subprocess.CompletedProcess[str]]

FIT_KEYS = {
    "run", "method", "schedule", "device", "test_accuracy", "votes", "budget_mb", "peak_gpu_mb", "predicted_peak_mb",
    "context_mb", "peak_host_mb", "disk_mb", "written_mb", "seconds", "energy_j", "cells",
}  # fmt: skip
CELL_KEYS = {
    "name", "params", "epochs", "train_loss", "test_accuracy", "peak_gpu_mb", "predicted_peak_mb", "seconds", "tiles",
    "micro_batch",
}  # fmt: skip
PLAN_KEYS = {
    "fits", "host_fits", "disk_fits", "min_budget_mb", "predicted_peak_mb", "bp_predicted_peak_mb", "disk_mb",
    "written_mb", "cells", "data",
}  # fmt: skip


@pytest.mark.slow
def test_fit_without_arguments_trains_on_digits_within_its_budget(edgetrain: Command, tmp_path: Path) -> None:
    done = edgetrain("fit", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record.keys() >= FIT_KEYS
    assert all(cell.keys() >= CELL_KEYS for cell in record["cells"])
    assert record["test_accuracy"] >= 0.93
    assert record["peak_gpu_mb"] <= record["budget_mb"] == 4.0
    assert record["peak_gpu_mb"] <= record["predicted_peak_mb"] <= record["peak_gpu_mb"] * 1.02
    assert (tmp_path / "runs" / "digits-mf" / "model.safetensors").exists()
    assert not (tmp_path / "runs" / "digits-mf" / "latents").exists()


def test_plan_says_what_fit_measures(edgetrain: Command) -> None:
    flags = ("--data", "digits", "--net", "mlp:64x3", "--epochs", "1", "--batch-size", "32", "--max-gpu-mb", "1")
    plan = json.loads(edgetrain("plan", *flags, "--json").stdout)
    record = json.loads(edgetrain("fit", *flags, "--json").stdout)
    assert plan.keys() >= PLAN_KEYS
    assert plan["fits"] is True
    assert (
        plan["data"]
        == record["input"]
        == "1,437 images, 1x8x8, 0..16 scaled to 0..1, normalised by the training images"
    )
    assert "Data: 1,437 images" in edgetrain("plan", *flags).stdout
    assert plan["predicted_peak_mb"] == record["predicted_peak_mb"] == record["peak_gpu_mb"]
    assert [cell["params"] for cell in plan["cells"]] == [cell["params"] for cell in record["cells"]]
    assert record["disk_mb"] <= plan["disk_mb"]
    assert record["written_mb"] <= plan["written_mb"]


@pytest.mark.slow
def test_plan_exits_0_where_nothing_fits_and_its_smallest_budget_works(edgetrain: Command) -> None:
    flags = ("--net", "mlp:64x2", "--epochs", "1", "--json")
    done = edgetrain("plan", *flags, "--max-gpu-mb", "0.01")
    assert done.returncode == 0
    plan = json.loads(done.stdout)
    assert plan["fits"] is False
    smallest = str(plan["min_budget_mb"])
    record = json.loads(edgetrain("fit", *flags, "--max-gpu-mb", smallest).stdout)
    assert record["peak_gpu_mb"] <= float(smallest)


@pytest.mark.slow
def test_a_plan_tells_times_once_doctor_has_measured_the_machine(edgetrain: Command) -> None:
    flags = ("plan", "--net", "mlp:64x2", "--epochs", "1")
    assert json.loads(edgetrain(*flags, "--json").stdout)["seconds"] is None
    assert "`edgetrain doctor`" in edgetrain(*flags).stdout
    assert edgetrain("doctor").returncode == 0
    plan = json.loads(edgetrain(*flags, "--json").stdout)
    assert plan["seconds"] >= 0
    assert {cell["bound"] for cell in plan["cells"]} <= {"compute", "bus", "disk"}
    assert "(compute)" in edgetrain(*flags).stdout


def test_evaluate_and_predict_agree_with_the_run(edgetrain: Command, tmp_path: Path) -> None:
    record = json.loads(edgetrain("fit", "--epochs", "2", "--run-dir", "r", "--json").stdout)
    found = json.loads(edgetrain("evaluate", "r", "--json").stdout)
    assert found["test_accuracy"] == record["test_accuracy"]
    assert found["votes"] == record["votes"]
    assert (found["data"], found["rows"]) == ("the 360 test rows of digits", 360)
    assert "data: 1,437 images" in edgetrain("fit", "--epochs", "1", "--run-dir", "other").stderr
    shown = edgetrain("evaluate", "r", "--per-cell").stdout
    assert "cell 2" in shown

    done = edgetrain("predict", "r", "--data", "digits", "--probabilities", "--latents", "z.npy")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 360
    assert np.load(tmp_path / "z.npy").shape == (360, 256)
    assert sum(float(rows[0][f"p{label}"]) for label in range(10)) == pytest.approx(1, abs=1e-4)
    labels = json.loads(edgetrain("predict", "r", "--data", "digits", "--json").stdout)["labels"]
    assert [int(row["label"]) for row in rows] == labels


def test_predict_takes_rows_without_labels_and_refuses_other_shapes(edgetrain: Command, tmp_path: Path) -> None:
    edgetrain("fit", "--epochs", "1", "--run-dir", "r", "--quiet")
    np.savez(tmp_path / "new.npz", x=np.zeros((3, 8, 8), np.uint8))
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 9, 9), np.uint8))
    assert len(json.loads(edgetrain("predict", "r", "--data", "new.npz", "--json").stdout)["labels"]) == 3
    refused = edgetrain("predict", "r", "--data", "other.npz")
    assert refused.returncode == 2
    assert "(1, 9, 9)" in refused.stderr


def test_rerunning_the_written_profile_gives_the_same_weights(edgetrain: Command, tmp_path: Path) -> None:
    edgetrain("fit", "--epochs", "1", "--run-dir", "a", "--quiet")
    edgetrain("fit", "--profile", "a/config.toml", "--run-dir", "b", "--quiet")
    for name in ("000.safetensors", "001.optim.safetensors"):
        assert (tmp_path / "a" / "cells" / name).read_bytes() == (tmp_path / "b" / "cells" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "predicts"), [("000", False), ("001", True)])
def test_a_damaged_cell_is_named_and_cells_before_it_predict(
    edgetrain: Command, tmp_path: Path, cell: str, predicts: bool
) -> None:
    edgetrain("fit", "--epochs", "1", "--run-dir", "r", "--quiet")
    path = tmp_path / "r" / "cells" / f"{cell}.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    done = edgetrain("evaluate", "r", "--json")
    assert done.returncode == 4
    assert f"{cell}.safetensors" in done.stderr
    if predicts:
        assert json.loads(done.stdout)["votes"]["cells"][1:] == []
        assert f"{cell}.safetensors" in json.loads(done.stdout)["missing"]
        listed = edgetrain("cells", "r", "list")
        assert listed.returncode == 4
        assert f"{cell}.safetensors" in listed.stdout.replace("\n", "")
        assert edgetrain("cells", "r", "retrain", "2", "--quiet").returncode == 0
        assert edgetrain("evaluate", "r").stderr == "evaluated the 360 test rows of digits\n"


@pytest.mark.slow
def test_a_second_process_in_a_run_folder_is_refused(tmp_path: Path, edgetrain: Command) -> None:
    command = [sys.executable, "-m", "edgetrain", "fit", "--epochs", "100000", "--run-dir", "r", "--quiet"]
    child = subprocess.Popen(command, cwd=tmp_path)
    try:
        for _ in range(600):
            if (tmp_path / "r" / "latents" / "000.y.rows").exists():
                break
            time.sleep(0.1)
        assert edgetrain("fit", "--run-dir", "r", "--force").returncode == 5
    finally:
        child.terminate()
        child.wait(60)


def test_help_answers_without_importing_torch() -> None:
    code = "import sys; from edgetrain.cli.main import cli; cli.main(['fit', '--help'], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", code + "; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Example:" in done.stdout


def test_doctor_tells_what_the_machine_is(edgetrain: Command) -> None:
    facts = json.loads(edgetrain("doctor", "--json").stdout)
    assert facts.keys() == {"machine", "device", "disk", "data", "warnings"}
    assert facts["device"]["gflops_float32"] > 0


# -- reports and profiles ------------------------------------------------------------------------------


def test_a_report_is_a_page_beside_the_run(edgetrain: Command, tmp_path: Path) -> None:
    done = edgetrain("fit", "--epochs", "1", "--run-dir", "a", "--quiet", "--tensorboard")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    done = edgetrain("report", "a")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "a/report.html, 7 figures in a/figures\n"
    (tmp_path / "a" / "record.json").unlink()
    done = edgetrain("report", "a", "--out", "b", "--json")
    found = json.loads(done.stdout)
    assert found["report"] == "b/report.html"
    assert all((tmp_path / path).stat().st_size > 1000 for path in found["figures"])
    assert ["record.json" in problem for problem in found["problems"]] == [True]
    assert "record.json" in edgetrain("report", "a").stderr


@pytest.mark.parametrize("words", [["nothing"], ["file"], ["folder"], [], ["a", "--out", "file"]])
def test_a_report_of_no_run_is_refused(words: list[str], edgetrain: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    done = edgetrain("report", *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["file", "folder"]


@pytest.mark.slow
def test_a_profile_as_json_csv_png_and_page(edgetrain: Command, tmp_path: Path) -> None:
    flags = ["--depths", "1,2,3", "--widths", "16", "--batch-size", "32", "--methods", "mf,bp"]
    outputs = ["--csv", "points.csv", "--png", "pictures", "--html", "page.html", "--timeline", "--json"]
    done = edgetrain("profile", *flags, *outputs)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["depth"] for row in found["rows"]] == [1, 2, 3, 1, 2, 3]
    assert all(row["peak_mb"] == row["predicted_mb"] for row in found["rows"])
    assert len((tmp_path / "points.csv").read_text().splitlines()) == 7
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"peaks.png", "seconds.png", "timeline.png"}
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert found["timelines"].keys() == {"mf", "bp"}
    assert len(found["kinds"]) == len(found["timelines"]["bp"][0]["mb"][0])
    told = edgetrain("profile", *flags, "--dry", "--timeline").stdout.splitlines()
    assert [line for line in told if line.startswith("mf: ") and "optimizer state" in line]


def test_profiles_compare_backpropagation_and_its_remedies_unasked(edgetrain: Command) -> None:
    found = json.loads(edgetrain("profile", "--dry", "--depths", "1,2", "--widths", "16", "--json").stdout)
    assert [row["method"] for row in found["slopes_mb_per_layer"]] == ["mf", "bp", "bp-checkpoint", "bp-offload"]
    assert "timelines" not in found


@pytest.mark.parametrize(
    "words",
    [
        ["--methods", "unheard"],
        ["--family", "tree"],
        ["--depths", "0"],
        ["--widths", "1,x"],
        ["--methods", "bp", "--tiles", "2"],
        ["--family", "cnn", "--depths", "9"],
        ["--html", "file/page.html", "--methods", "unheard"],
    ],
)
def test_a_wrong_profile_writes_nothing(words: list[str], edgetrain: Command, tmp_path: Path) -> None:
    outputs = [*(["--html", "new/page.html"] if "--html" not in words else []), "--png", "new", "--csv", "new/a.csv"]
    done = edgetrain("profile", *words, *outputs, "--dry")
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].strip()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


QUICK = ("--data", "digits", "--net", "mlp:8", "--epochs", "1", "--quiet")


@pytest.mark.parametrize("state", ["missing", "empty", "with an empty journal"])
@pytest.mark.parametrize("words", [[], ["--epochs", "2"], ["--max-gpu-mb", "64", "--seed", "1"], ["--print-config"]])
def test_resume_without_a_run_is_refused_and_creates_nothing(
    edgetrain: Command, tmp_path: Path, state: str, words: list[str]
) -> None:
    if state != "missing":
        (tmp_path / "typo").mkdir()
    if state == "with an empty journal":
        (tmp_path / "typo" / "journal.jsonl").touch()
    before = sorted(tmp_path.rglob("*"))
    done = edgetrain("fit", "--resume", "--run-dir", "typo", *words, EDGETRAIN_NET="mlp:8", EDGETRAIN_EPOCHS="1")
    assert done.returncode == 2
    assert done.stderr.startswith("edgetrain: typo: no run to resume")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [QUICK[:2], QUICK[2:4], ["--profile", "quickstart"]])
def test_resume_starts_a_run_where_the_command_says_what_to_train(edgetrain: Command, words: list[str]) -> None:
    small = ("--epochs", "1", "--quiet", "--batch-size", "256")
    for _ in range(2):
        done = edgetrain("fit", "--resume", "--run-dir", "loop", *words, *small)
        assert done.returncode == 0, done.stderr


def test_resume_starts_a_run_without_a_checkpoint_again(edgetrain: Command, tmp_path: Path) -> None:
    RunFolder(tmp_path / "r").create(begin(Settings(net="mlp:8", epochs=1).to_toml()))
    done = edgetrain("fit", "--resume", "--run-dir", "r", "--json")
    assert done.returncode == 0, done.stderr
    assert [cell["name"] for cell in json.loads(done.stdout)["cells"]] == ["linear 64-8"]


@pytest.mark.parametrize("name", ["notes.txt", "journal.jsonl"])
def test_resume_leaves_a_folder_of_other_files_alone(edgetrain: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("something of mine, long enough\n")
    done = edgetrain("fit", "--resume", "--run-dir", "mine", *QUICK)
    assert done.returncode == 2, done.stderr
    with pytest.raises(InputError, match="is not an edgetrain run"):
        api.fit("mlp:8", "digits", run_dir=tmp_path / "mine", resume=True, epochs=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]


def test_resume_in_python_needs_a_folder_and_starts_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run_dir"):
        api.fit("mlp:8", "digits", resume=True, epochs=1)
    for _ in range(2):
        api.fit("mlp:8", "digits", run_dir=tmp_path / "loop", resume=True, epochs=1)


@pytest.mark.parametrize("flag", ["--out", "--latents"])
@pytest.mark.parametrize("target", ["missing/a", "folder", "/dev/null"])
def test_predict_refuses_targets_before_it_reads_anything(
    edgetrain: Command, tmp_path: Path, flag: str, target: str
) -> None:
    (tmp_path / "folder").mkdir()
    done = edgetrain("predict", "no-such-run", "--data", "digits", flag, target)
    assert done.returncode == 2
    assert done.stderr.startswith(f"edgetrain: {target}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_threads_that_it_was_begun_with(edgetrain: Command, tmp_path: Path) -> None:
    words = ("fit", "--run-dir", "r", *QUICK)
    stopped = edgetrain(*words, "--time-limit", "0.000001", "--threads", "2", OMP_THREAD_LIMIT="2")
    assert stopped.returncode == 143, stopped.stderr
    before = (tmp_path / "r" / "journal.jsonl").read_bytes()
    refused = edgetrain("fit", "--resume", "--run-dir", "r", "--quiet", OMP_THREAD_LIMIT="1")
    assert refused.returncode == 2
    assert "set OMP_THREAD_LIMIT=2" in refused.stderr
    assert (tmp_path / "r" / "journal.jsonl").read_bytes() == before
    assert edgetrain("fit", "--resume", "--run-dir", "r", "--quiet", OMP_THREAD_LIMIT="2").returncode == 0
    assert edgetrain("evaluate", "r", OMP_THREAD_LIMIT="1").returncode == 0
    refused = edgetrain("cells", "r", "retrain", "1", "--quiet", OMP_THREAD_LIMIT="1")
    assert (refused.returncode, "set OMP_THREAD_LIMIT=2" in refused.stderr) == (2, True)


BAD_NAME = "b\udcff"  # the byte 0xff on the command line


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--run-dir", BAD_NAME, *QUICK],
        ["fit", "--run-dir", f"{BAD_NAME}/r", *QUICK],
        ["predict", "r", "--data", "digits", "--out", BAD_NAME],
        ["predict", "r", "--data", "digits", "--latents", BAD_NAME],
        ["report", "r", "--out", BAD_NAME],
        *(["profile", "--dry", "--depths", "1", flag, BAD_NAME] for flag in ("--csv", "--png", "--html")),
    ],
)
def test_names_that_are_not_utf8_are_refused(edgetrain: Command, tmp_path: Path, words: list[str]) -> None:
    done = edgetrain(*words)
    assert done.returncode == 2
    assert "not valid UTF-8" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_several_seeds_give_mean_and_deviation(edgetrain: Command, tmp_path: Path) -> None:
    words = ("fit", "--data", "digits", "--net", "mlp:12", "--epochs", "1", "--seed", "4", "--quiet", "--run-dir", "s")
    found = json.loads(edgetrain(*words, "--seeds", "3", "--json").stdout)
    accuracies = [record["test_accuracy"] for record in found["runs"]]
    assert len(set(accuracies)) > 1
    assert found["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["test_accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert found["seeds"] == 3
    alone = json.loads(edgetrain(*words[:-1], "alone", "--json").stdout)
    assert alone["test_accuracy"] == accuracies[0]
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == (
        tmp_path / "s" / "seed-4" / "model.safetensors"
    ).read_bytes()
    assert edgetrain(*words, "--seeds", "3").returncode == 2  # the folders hold runs
    shutil.rmtree(tmp_path / "s" / "seed-5")
    told = edgetrain(*words, "--seeds", "3", "--resume")
    assert told.returncode == 0, told.stderr
    assert f"{found['test_accuracy']:.4f} ± {found['test_accuracy_std']:.4f}" in told.stdout
    other = edgetrain(*words, "--seeds", "3", "--resume", "--lr", "0.5")
    assert (other.returncode, "was begun with lr" in other.stderr) == (2, True)
    assert edgetrain(*words, "--seeds", "1").returncode == 2
    shutil.rmtree(tmp_path / "s" / "seed-4")
    for more in ((), ("--resume", "--force")):
        refused = edgetrain(*words, "--seeds", "3", *more)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    refused = edgetrain(*words[:-1], "alone", "--seeds", "2")
    assert (refused.returncode, "holds a run" in refused.stderr) == (2, True)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["seed-5", "seed-6"]  # none was begun
    assert not list((tmp_path / "alone").glob("seed-*"))
