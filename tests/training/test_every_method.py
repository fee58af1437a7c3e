"""Every rule and baseline from data to labels: its memory is predicted, placement changes no bit, the CLI takes it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from machine import assert_same, units

from edgetrain.baselines import BASELINES
from edgetrain.cli.main import cli
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet, Part
from edgetrain.errors import InputError
from edgetrain.objectives import OBJECTIVES
from edgetrain.planning import dryrun, planner
from edgetrain.record import RunRecord
from edgetrain.store.run import RunFolder
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.training.methods import METHODS
from edgetrain.training.run import Run
from edgetrain.units import to_mb

ROWS, TEST_ROWS, CLASSES, BATCH = 70, 9, 4, 32  # the last batch holds 6 rows
NETS = {"lbp-cae": "cnn:4,6", "sll+": "vit:depth=2,width=16,heads=2,patch=4"}
ALWAYS_CLASSIFY = ("lbp-ae", "lbp-dae", "lbp-cae", "lbp-gan")
MAY_CLASSIFY = ("ff", "symba", "sll", "sll+")
NEVER_CLASSIFY = ("mf", "predsim", *BASELINES)
STREAMED = ("bp-stream",)  # in every step
IN_ONE_CELL = tuple(name for name in BASELINES if name not in STREAMED)


def test_these_are_all_methods() -> None:
    assert list(METHODS) == [*OBJECTIVES, *BASELINES]
    assert set(OBJECTIVES) == {*ALWAYS_CLASSIFY, *MAY_CLASSIFY, "mf", "predsim"}
    assert set(BASELINES) == {"slp", "bp", "bp-checkpoint", "bp-offload", "bp-stream", "fa", "dfa"}
    assert {name for name, kind in METHODS.items() if kind.vote == "classifier"} == set(ALWAYS_CLASSIFY)
    assert {name for name, kind in METHODS.items() if kind.classifier is None} == set(NEVER_CLASSIFY)


def settings(name: str, trained: bool = False, **values: Any) -> Settings:
    standard = {"net": NETS.get(name, "mlp:24,20"), "epochs": 2, "batch_size": BATCH, "seed": 3, "threads": 1}
    if trained:
        standard["classifier_epochs"] = 2
    return Settings().with_values({"method": name, "device": "cpu", "meter": "full", **standard, **values})


@cache
def images() -> DataSet:
    draw = np.random.default_rng(3)
    x = draw.integers(0, 256, (ROWS + TEST_ROWS, 8, 8), dtype=np.uint8)
    y = np.concatenate([np.arange(CLASSES), draw.integers(0, CLASSES, ROWS + TEST_ROWS - CLASSES)])
    return from_arrays((x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- memory and placement ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method, whether a classifier is trained, the schedule, and the micro-batch."""

    name: str
    trained: bool
    schedule: str | None
    micro_batch: int
    more: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [self.name, self.schedule, "classifier" * self.trained, f"{self.micro_batch} of {BATCH}"]
        return ", ".join(filter(None, [*words, *(f"{key} {value}" for key, value in self.more)]))


def cases() -> Iterator[Case]:
    """Each rule under both schedules, by micro-batches under one of them; baselines whole and cut."""
    for name in OBJECTIVES:
        for trained in (name in ALWAYS_CLASSIFY, name not in NEVER_CLASSIFY):
            yield Case(name, trained, "separate", BATCH)
            if name != "symba" or not trained:  # ff with another loss
                yield Case(name, trained, "sequence", BATCH if METHODS[name].couples_batch else 10)
    for name in BASELINES:
        yield Case(name, False, None, BATCH)
        yield Case(name, False, None, 10)
    yield Case("mf", False, "separate", BATCH, (("augment", "crop,flip,cutout"), ("views", 2), ("net", "cnn:4,6")))
    yield Case("sll", True, "sequence", 10, (("augment", "crop"), ("net", "cnn:4,6")))
    yield Case("ff", True, "separate", 10, (("views", 2),))
    yield Case("lbp-cae", True, "separate", 10, (("augment", "flip"), ("views", 2)))
    yield Case("bp", False, None, 10, (("augment", "crop,flip"), ("net", "cnn:4,6")))


def given_by(case: Case, placement: str) -> Settings:
    values = {"schedule": case.schedule, "micro_batch": case.micro_batch, **dict(case.more)}
    return settings(case.name, case.trained, placement=placement, **values)


RunOf = Callable[[Case, str], Run]
EVERY_CASE = pytest.mark.parametrize("case", dict.fromkeys(cases()), ids=str)
RESIDENT_CASE = pytest.mark.parametrize(
    "case", [case for case in dict.fromkeys(cases()) if case.name not in STREAMED], ids=str
)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """A run of each kind, made once; dry runs are pure, and shared by both placements."""
    known: dict[Any, int] = {}

    @cache
    def of(case: Case, placement: str) -> Run:
        def once(work: Any, *how: int) -> int:
            key = (case, *how)
            if key not in known:
                known[key] = dryrun.cell_peak(work, *how)
            return known[key]

        path = tmp_path_factory.mktemp("runs") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planner, "cell_peak", once)
            return fit(given_by(case, placement), path, data=images())

    return of


def peaks(record: RunRecord) -> tuple[list[float | None], list[float | None]]:
    """What was predicted of each visit and of the run, and what was measured."""
    visits = record.visits
    predicted = [visit.predicted_peak_mb for visit in visits]
    return [*predicted, record.predicted_peak_mb], [*(visit.peak_gpu_mb for visit in visits), record.peak_gpu_mb]


@EVERY_CASE
def test_the_predicted_peaks_of_a_streamed_run_are_the_measured_ones(run_of: RunOf, case: Case) -> None:
    predicted, measured = peaks(run_of(case, "stream").record)
    assert predicted == measured
    assert len(measured) == (1 if case.name in IN_ONE_CELL else 2) + case.trained + 1


@RESIDENT_CASE
def test_the_predicted_peaks_of_a_resident_run_are_the_measured_ones(run_of: RunOf, case: Case) -> None:
    predicted, measured = peaks(run_of(case, "resident").record)
    assert predicted == measured


@EVERY_CASE
def test_the_run_folder_takes_no_more_disk_than_planned(
    run_of: RunOf, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_of(case, "stream").record
    monkeypatch.setattr(planner, "cell_peak", lambda work, *how: dryrun.Peak(0))
    plan = plan_job(open_job(given_by(case, "stream"), data=images()))
    assert record.disk_mb is not None
    assert record.disk_mb <= (to_mb(plan.disk_bytes) or 0.0)
    assert record.latents_mb == to_mb(sum(cell.latents for cell in plan.cells))


@RESIDENT_CASE
def test_streamed_and_resident_runs_give_the_same_bits(run_of: RunOf, case: Case) -> None:
    streamed, resident = (run_of(case, placement) for placement in ("stream", "resident"))
    assert_same(units(resident.path), units(streamed.path))
    assert resident.record.votes == streamed.record.votes


class PowerCut(Exception):  # noqa: N818 (it is not one of our errors)
    """Stands for the end of a process."""


#: Each method once, cut into micro-batches where it can be, and what is special.
ONCE = list(
    {**{case.name: case for case in cases() if not case.more}, **{str(c): c for c in cases() if c.more}}.values()
)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONCE, ids=str)
def test_a_run_that_was_cut_after_every_checkpoint_ends_the_same(
    run_of: RunOf, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, path, cuts = units(run_of(case, "stream").path), tmp_path / "run", 0
    given, save = given_by(case, "stream").with_values({"checkpoint_every": 0.0}), RunFolder.save

    def saves_and_dies(folder: RunFolder, *arguments: Any) -> None:
        nonlocal cuts
        save(folder, *arguments)
        cuts += 1
        raise PowerCut

    monkeypatch.setattr(RunFolder, "save", saves_and_dies)
    monkeypatch.setattr(planner, "cell_peak", lambda work, *how: dryrun.Peak(0))
    while not (path / "record.json").exists() and cuts < 20:
        with suppress(PowerCut):
            fit(given, path, data=images(), resume=True)
    assert cuts >= 2
    assert_same(units(path), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_record_cites_the_paper_of_its_method(run_of: RunOf, name: str) -> None:
    case = next(case for case in cases() if case.name == name)
    assert METHODS[name].citation in run_of(case, "stream").record.citations
    assert len(METHODS[name].citation) > 20
    assert METHODS[name].needs


# -- from data to labels -------------------------------------------------------------------------------

#: What a method needs to learn the digits a little in two epochs, where it differs.
DIGITS = {"lbp-gan": ("--lr", "1e-3"), "ff": ("--lr", "0.03", "--net", "mlp:64x2")}


def said(*words: str) -> str:
    """What the command prints."""
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", METHODS)
def test_the_commands_train_evaluate_and_predict(name: str, tmp_path: Path) -> None:
    run, net = str(tmp_path / "run"), NETS.get(name, "mlp:48x2")
    flags = ("--data", "digits", "--method", name, "--epochs", "2", "--batch-size", "32", "--device", "cpu")
    given = (*flags, "--threads", "1", *DIGITS.get(name, ("--lr", "0.01")), "--run-dir", run, "--quiet", "--json")
    record = json.loads(said("fit", *given, *(() if "--net" in given else ("--net", net))))
    assert record["method"] == name
    assert METHODS[name].citation in record["citations"]
    assert record["test_accuracy"] == record["votes"][METHODS[name].vote] > 0.2  # 0.1 by chance
    votes = {"classifier"} if name in ALWAYS_CLASSIFY else {"sum", "last"}
    assert set(record["votes"]) == {*votes, "cells"}
    assert len(record["cells"]) == len(record["votes"]["cells"]) == (1 if name in IN_ONE_CELL else 2)
    assert (record["classifier"] is not None) == (name in ALWAYS_CLASSIFY)

    found = json.loads(said("evaluate", run, "--json"))
    assert found["test_accuracy"] == record["test_accuracy"]
    assert found["votes"] == record["votes"]

    rows = list(csv.DictReader(io.StringIO(said("predict", run, "--data", "digits", "--probabilities"))))
    labels, opened = [int(row["label"]) for row in rows], Run.open(Path(run))
    assert opened.predict("digits").tolist() == labels
    assert len(labels) == 360
    assert sum(float(rows[0][f"p{label}"]) for label in range(10)) == pytest.approx(1, abs=1e-4)
    shape = opened.latents("digits", tmp_path / "z.npy")
    assert np.load(tmp_path / "z.npy").shape == shape == (360, *opened.nodes[-1].shape)


@pytest.mark.parametrize("name", METHODS)
def test_labels_of_new_rows_do_not_depend_on_how_many_are_asked_for(run_of: RunOf, name: str) -> None:
    run = run_of(next(case for case in cases() if case.name == name), "stream")
    x = np.random.default_rng(5).integers(0, 256, (41, 8, 8), dtype=np.uint8)
    whole = run.scores(x)
    torch.testing.assert_close(torch.from_numpy(run.scores(x[:1])), torch.from_numpy(whole[:1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(run.scores(x[:33])), torch.from_numpy(whole[:33]), rtol=1e-5, atol=1e-6)


# -- classifiers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALWAYS_CLASSIFY, *MAY_CLASSIFY])
def test_a_trained_classifier_is_one_more_vote(run_of: RunOf, name: str) -> None:
    votes, own = {}, METHODS[name].vote
    for case in cases():
        if case.name == name and not case.more and case.schedule == "separate":
            run = run_of(case, "stream")
            votes[case.trained] = set(run.record.votes) - {"cells"}
            assert (run.record.classifier is not None) == case.trained
            assert set(run.evaluate((images_of_test(), labels_of_test())).accuracy) == votes[case.trained]
            assert run.record.test_accuracy == run.record.votes[own]
    assert votes[True] == ({"classifier"} if name in ALWAYS_CLASSIFY else {"sum", "last", "classifier"})
    assert votes.get(False) == (None if name in ALWAYS_CLASSIFY else {"sum", "last"})


def images_of_test() -> np.ndarray:
    assert images().test is not None
    return np.concatenate([x for x, _ in images().test.chunks()])  # type: ignore[union-attr]


def labels_of_test() -> np.ndarray:
    return np.concatenate([y for _, y in images().test.chunks()])  # type: ignore[union-attr]


@pytest.mark.parametrize("flag", ["classifier_epochs", "classifier_lr", "classifier_weight_decay"])
@pytest.mark.parametrize("name", NEVER_CLASSIFY)
def test_methods_without_a_classifier_refuse_its_settings(name: str, flag: str) -> None:
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} is for methods that train a classifier"):
        open_job(settings(name, **{flag: 2}), data=images())


@pytest.mark.parametrize("name", MAY_CLASSIFY)
def test_a_classifiers_rate_needs_a_classifier(name: str) -> None:
    with pytest.raises(InputError, match="--classifier-lr .* does with --classifier-epochs"):
        open_job(settings(name, classifier_lr=0.1), data=images())
    assert open_job(settings(name, True, classifier_lr=0.1), data=images()).work.classifier is not None


@pytest.mark.parametrize("name", [*ALWAYS_CLASSIFY, *MAY_CLASSIFY])
def test_under_sequence_the_classifier_trains_in_every_epoch(name: str) -> None:
    with pytest.raises(InputError, match="--classifier-epochs 1: under --schedule sequence"):
        open_job(settings(name, schedule="sequence", classifier_epochs=1), data=images())
    separate = open_job(settings(name, schedule="separate", classifier_epochs=5), data=images())
    assert (separate.work.epochs, separate.work.classifier_epochs) == (2, 5)


# -- constants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_constants_of_other_rules_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"--constants 'nonsense=1': {name}") as caught:
        open_job(settings(name, constants="nonsense=1"), data=images())
    assert all(known in str(caught.value) for known in METHODS[name].constants)
    assert METHODS[name].constants or "has no constants" in str(caught.value)


CONSTANTS = [(name, constant) for name, kind in METHODS.items() for constant in kind.constants]


@pytest.mark.parametrize(("name", "constant"), CONSTANTS)
@pytest.mark.parametrize("value", ["", "many", "-1", "-0.001", "nan", "inf", "1e999", "0x1", "1;2"])
def test_a_constant_is_a_number_from_0_on(name: str, constant: str, value: str) -> None:
    with pytest.raises(InputError, match=f"--constants .*{constant}=.*expected a number"):
        open_job(settings(name, constants=f"{constant}={value}"), data=images())


@pytest.mark.parametrize(("name", "constant"), CONSTANTS)
def test_a_constant_reaches_the_rule(name: str, constant: str) -> None:
    objective = open_job(settings(name, constants=f" {constant} = 0.25 ,"), data=images()).work.objective
    assert objective.constants == {**METHODS[name].constants, constant: 0.25}
    assert METHODS[name].constants[constant] != 0.25


@pytest.mark.parametrize(
    ("name", "constants"), [("sll", "dropout=1.5"), ("sll", "dropout=1"), ("sll+", "dropout=1"), ("predsim", "beta=7")]
)
def test_a_share_is_below_1(name: str, constants: str) -> None:
    with pytest.raises(InputError, match="--constants"):
        open_job(settings(name, constants=constants), data=images())


# -- data of all kinds ---------------------------------------------------------------------------------

TAKES_TOKENS = ("mf", "sll", "predsim", *BASELINES.keys() - {"slp"})


def texts() -> DataSet:
    """Rows of token ids whose first id tells the class."""
    draw = np.random.default_rng(3)
    ids, y = draw.integers(0, 12, (60, 5)).astype(np.int64), np.arange(60) % 3
    ids[:, 0] = y + 1
    train, test = (
        Part(30, lambda rows=rows: iter([(ids[rows], y[rows])]), "made") for rows in (slice(30), slice(30, 60))
    )
    return DataSet("made", (5,), None, "tokens", 3, train, test, ("a", "b", "c"), 12)


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_token_ids_are_learned_or_refused(name: str, tmp_path: Path) -> None:
    given = settings(name, net="mlp:8;embedding=6", batch_size=10, epochs=3, lr=0.03)
    if name not in TAKES_TOKENS:
        with pytest.raises(InputError, match=re.escape(f"{name} cannot learn from token ids")):
            open_job(given, data=texts())
        return
    run = fit(given, tmp_path / "run", data=texts())
    predicted, measured = peaks(run.record)
    assert predicted == measured
    assert run.record.test_accuracy is not None
    assert len(run.nodes) == (1 if name in IN_ONE_CELL else 2)


def table(rows: int, width: int = 9) -> DataSet:
    """Measurements with negative values."""
    x = np.random.default_rng(3).standard_normal((rows + 9, width)).astype(np.float32) - 4
    y = np.arange(rows + 9) % 3
    return from_arrays((x[:rows], y[:rows]), (x[rows:], y[rows:]))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NETS])
def test_tables_are_learned_from_and_a_last_batch_of_one_row_too(name: str, tmp_path: Path) -> None:
    rows = 40 if METHODS[name].couples_batch else 33
    run = fit(settings(name, net="mlp:8,6", batch_size=16), tmp_path / "run", data=table(rows))
    assert run.record.predicted_peak_mb == run.record.peak_gpu_mb
    learned = [cell.train_loss is not None for cell in run.record.cells]
    assert all(learned[-1:] if name in STREAMED else learned)


@pytest.mark.parametrize(("name", "net"), [("predsim", "mlp:8,6"), ("mf", "mlp:8,6;norm=batch")])
def test_a_last_batch_of_one_row_that_cannot_be_normalised_is_refused(name: str, net: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--batch-size 16 leaves a last batch of one of the 33 rows"):
        fit(settings(name, net=net, batch_size=16), tmp_path / "run", data=table(33))
    assert not (tmp_path / "run").exists()


# -- micro-batches -------------------------------------------------------------------------------------


def test_a_rule_that_compares_samples_takes_batches_whole() -> None:
    with pytest.raises(InputError, match="--micro-batch 31: the samples of a batch influence each other"):
        plan_job(open_job(settings("predsim", micro_batch=31), data=images()))
    assert plan_job(open_job(settings("predsim", micro_batch=BATCH), data=images())).micro_batches == [BATCH] * 2
