"""Mistakes with rules, nets and their options: one line that says what and what to do, exit code 2, nothing written.

As ``test_bad_input.py``, but the command runs within this process: there are many.
"""

from __future__ import annotations

import csv
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgetrain.cli.main import main

Typed = Callable[..., tuple[int, str, str]]

DIGITS = ["--data", "digits"]
FLAT, THIN, FEW, IMAGES = (["--data", f"{name}.npz"] for name in ("flat", "thin", "few", "images"))
TEXTS = ["--data", "imdb"]
VIT = "vit:depth=2,width=8,heads=2,patch=4"

# What is typed after ``fit``, and words that the line must hold.
MISTAKES = {
    # data that a rule cannot learn from
    "lbp-cae on flat rows": ([*FLAT, "--method", "lbp-cae"], ["cnn:64,128", "images", "(9,)"]),
    "sll+ on flat rows": ([*FLAT, "--method", "sll+"], ["vit:", "images", "(9,)"]),
    "lbp-cae on a table": (["--data", "breast-cancer", "--method", "lbp-cae"], ["images", "(30,)"]),
    "sll+ on a table": (["--data", "breast-cancer", "--method", "sll+"], ["images", "(30,)"]),
    "lbp-cae on images of one row": ([*THIN, "--method", "lbp-cae"], ["1x6", "halved 0 times"]),
    "lbp-cae deeper than the images": ([*DIGITS, "--method", "lbp-cae", "--net", "cnn:4,4,4,4"], ["8x8", "at most 3"]),
    "lbp-cae on odd images that run out": ([*IMAGES, "--method", "lbp-cae", "--net", "cnn:4,4,4,4"], ["5x7", "3"]),
    **{
        f"{method} with more classes than inputs": (
            [*FEW, "--input", "image", "--method", method],
            [method, "5 classes", "3 inputs"],
        )
        for method in ("ff", "symba")
    },
    **{
        f"{method} on texts": ([*TEXTS, "--method", method, "--net", "mlp:8"], [method, "token ids", "mlp:"])
        for method in ("ff", "symba", "slp", "lbp-ae", "lbp-dae", "lbp-gan")
    },
    "lbp-cae on texts": ([*TEXTS, "--method", "lbp-cae"], ["cnn:64,128", "token ids"]),
    "sll+ on texts": ([*TEXTS, "--method", "sll+"], ["vit:", "token ids"]),
    # nets that a rule cannot train
    "lbp-cae with a dense net": ([*DIGITS, "--method", "lbp-cae", "--net", "mlp:8"], ["lbp-cae", "cell 1", "cnn:"]),
    "lbp-cae with cells that do not halve": (
        [*IMAGES, "--method", "lbp-cae", "--net", "cnn:4;odd=floor"],
        ["lbp-cae", "cell 1", "odd=pad"],
    ),
    "lbp-cae with vgg": ([*DIGITS, "--method", "lbp-cae", "--net", "vgg8b:0.05"], ["lbp-cae", "cell 1"]),
    "lbp-cae with a transformer": ([*DIGITS, "--method", "lbp-cae", "--net", VIT], ["lbp-cae", "cell 1"]),
    "sll+ with a dense net": ([*DIGITS, "--method", "sll+", "--net", "mlp:8"], ["sll+", "tokens", "--method sll"]),
    "sll+ with a convolutional net": ([*DIGITS, "--method", "sll+", "--net", "cnn:4"], ["sll+", "tokens", "cell 1"]),
    "fa on a transformer": ([*DIGITS, "--method", "fa", "--net", VIT], ["fa", "dense", "--method dfa"]),
    "fa on local layers": ([*DIGITS, "--method", "fa", "--net", "lcmlp:2"], ["fa", "LocallyConnected"]),
    # the vit spec
    "vit without sizes": ([*DIGITS, "--net", "vit"], ["vit", "depth=7"]),
    "vit with sizes missing": ([*DIGITS, "--net", "vit:depth=2"], ["width, heads, patch missing"]),
    "vit with an unknown size": ([*DIGITS, "--net", f"{VIT},deep=3"], ["deep", "ratio"]),
    "vit with a size twice": ([*DIGITS, "--net", f"{VIT},depth=3"], ["depth=3", "once"]),
    "vit with a size that is not a number": ([*DIGITS, "--net", "vit:depth=two"], ["depth=two"]),
    "vit of depth 0": ([*DIGITS, "--net", VIT.replace("depth=2", "depth=0")], ["depth=0"]),
    "vit with heads that do not fit": ([*DIGITS, "--net", VIT.replace("heads=2", "heads=3")], ["8", "3 heads"]),
    "vit with patches that do not fit": ([*DIGITS, "--net", VIT.replace("patch=4", "patch=3")], ["8x8", "side 3"]),
    # options that a family of nets does not understand
    "pooling of an mlp": ([*DIGITS, "--net", "mlp:8;pool=max"], ["option pool", "mlp"]),
    "odd sides of an mlp": ([*DIGITS, "--net", "mlp:8;odd=pad"], ["option odd", "mlp"]),
    "tokens of an mlp": ([*DIGITS, "--net", "mlp:8;tokens=mean"], ["option tokens", "mlp"]),
    "tokens of a cnn": ([*DIGITS, "--net", "cnn:4;tokens=mean"], ["option tokens", "cnn"]),
    "embedding of an mlp on images": ([*DIGITS, "--net", "mlp:8;embedding=5"], ["option embedding", "mlp"]),
    "pooling of local layers": ([*DIGITS, "--net", "lcmlp:2;pool=avg"], ["option pool", "lcmlp"]),
    "pooling of a vit": ([*DIGITS, "--net", f"{VIT};pool=max"], ["option pool", "vit"]),
    "normalisation of a vit": ([*DIGITS, "--net", f"{VIT};norm=batch"], ["option norm", "vit"]),
    "unknown activation": ([*DIGITS, "--net", "mlp:8;act=gelu"], ["act='gelu'", "relu, leaky"]),
    "dropout of everything": ([*DIGITS, "--net", "mlp:8;dropout=1"], ["dropout='1'", "below 1"]),
    "unknown reading of tokens": ([*DIGITS, "--net", f"{VIT};tokens=max"], ["tokens='max'", "class, mean"]),
    "vgg with a wrong factor": ([*DIGITS, "--net", "vgg8b:wide"], ["vgg8b:wide", "vgg8b:0.5"]),
    "local patches that are too large": ([*DIGITS, "--net", "lcmlp:17"], ["17", "8x8", "at most 16"]),
    # batches that are compared whole
    "predsim by micro-batches": (
        [*DIGITS, "--method", "predsim", "--batch-size", "32", "--micro-batch", "31"],
        ["--micro-batch 31", "batches whole"],
    ),
    # changed images, and views of them
    "augmentation of flat rows": (
        [*FLAT, "--augment", "flip", "--schedule", "sequence"],
        ["--augment", "images", "(9,)"],
    ),
    "augmentation of a table": (
        ["--data", "breast-cancer", "--augment", "crop", "--schedule", "sequence"],
        ["--augment", "images"],
    ),
    "augmentation of texts": ([*TEXTS, "--augment", "flip", "--schedule", "sequence"], ["--augment", "images"]),
    "unknown augmentation": ([*DIGITS, "--augment", "flip,spin", "--schedule", "sequence"], ["'spin'", "cutout"]),
    "augmentation twice": ([*DIGITS, "--augment", "flip,flip", "--schedule", "sequence"], ["'flip'", "more than once"]),
    "augmentation of nothing": ([*DIGITS, "--augment", ",", "--schedule", "sequence"], ["--augment", "crop"]),
    "augmentation without views": ([*DIGITS, "--augment", "flip", "--schedule", "separate"], ["--views", "sequence"]),
    "augmentation without views, by default": ([*DIGITS, "--method", "mf", "--augment", "flip"], ["--views N"]),
    "views under sequence": (
        [*DIGITS, "--augment", "flip", "--views", "2", "--schedule", "sequence"],
        ["--views", "--schedule separate"],
    ),
    "views under a default of sequence": (
        [*DIGITS, "--method", "sll", "--augment", "flip", "--views", "2"],
        ["--views", "--schedule separate"],
    ),
    "views of a baseline": ([*DIGITS, "--method", "bp", "--augment", "flip", "--views", "2"], ["--views", "fresh"]),
    "views that are all the same": ([*DIGITS, "--views", "2"], ["--views needs --augment"]),
    "no views": ([*DIGITS, "--augment", "flip", "--views", "0"], ["--views", "at least 1"]),
    # cells
    "more cells than there are": ([*DIGITS, "--net", "mlp:8x2", "--cells", "3"], ["--cells 3", "mlp:8x2", "2 cells"]),
    "no cells": ([*DIGITS, "--cells", "0"], ["--cells", "at least 1"]),
    "half a cell": ([*DIGITS, "--cells", "1.5"], ["--cells", "1.5"]),
    # the rules' own numbers
    "constant of another rule": ([*DIGITS, "--method", "ff", "--constants", "alpha=1"], ["alpha", "known: threshold"]),
    "constant of a rule without": ([*DIGITS, "--constants", "beta=1"], ["mf has no constants", "beta"]),
    "constant of a baseline": ([*DIGITS, "--method", "bp", "--constants", "beta=1"], ["bp has no constants"]),
    "constant that is not a number": ([*DIGITS, "--method", "symba", "--constants", "alpha=high"], ["alpha='high'"]),
    "constant without a value": ([*DIGITS, "--method", "sll", "--constants", "beta"], ["beta=''", "number"]),
    "constant below 0": ([*DIGITS, "--method", "lbp-dae", "--constants", "noise=-1"], ["noise=-1", "from 0 on"]),
    "constant beyond all numbers": ([*DIGITS, "--method", "ff", "--constants", "threshold=1e999"], ["1e999"]),
    "constant that is nan": ([*DIGITS, "--method", "sll", "--constants", "beta=nan"], ["beta=nan"]),
    # the classifier
    "rate of a classifier that is not trained": (
        [*DIGITS, "--method", "ff", "--classifier-lr", "1e-3"],
        ["--classifier-lr", "ff", "--classifier-epochs"],
    ),
    "classifier of a rule without": (
        [*DIGITS, "--method", "predsim", "--classifier-epochs", "2"],
        ["predsim does not"],
    ),
    "classifier of a baseline": ([*DIGITS, "--method", "dfa", "--classifier-epochs", "2"], ["dfa does not"]),
    "classifier for no epochs": ([*DIGITS, "--method", "ff", "--classifier-epochs", "0"], ["at least 1"]),
    "classifier with epochs of its own under sequence": (
        [*DIGITS, "--method", "sll", "--epochs", "3", "--classifier-epochs", "2"],
        ["--classifier-epochs 2", "--schedule sequence", "3 epochs"],
    ),
    # baselines
    "like nothing": ([*DIGITS, "--method", "bp", "--like", "nothing"], ["like", "nothing"]),
    "like for a rule": ([*DIGITS, "--method", "ff", "--like", "mf"], ["--like is for baselines", "dfa"]),
    "schedule for a baseline": ([*DIGITS, "--method", "slp", "--schedule", "sequence"], ["--schedule", "slp"]),
    "method that is nearly one": ([*DIGITS, "--method", "lbp-ea"], ["lbp-ea", "lbp-ae"]),
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Data sets that do not suit every rule."""
    draw, y = np.random.default_rng(0), np.arange(60) % 3
    for name, shape in (("flat", (9,)), ("thin", (1, 6)), ("images", (5, 7))):
        x = draw.integers(0, 256, (60, *shape), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    x, y = draw.integers(0, 256, (60, 3), dtype=np.uint8), np.arange(60) % 5
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (tmp_path / "imdb").mkdir()
    with (tmp_path / "imdb" / "imdb.csv").open("w", newline="") as file:
        rows = [
            (word, label, split) for split in ("train", "test") for word, label in (("good", "pos"), ("bad", "neg"))
        ]
        csv.writer(file).writerows([("text", "label", "split"), *rows])
    return tmp_path


@pytest.fixture
def typed(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Typed]:
    """``typed(*words)`` runs the command in the folder of the files; gives exit code, stdout and stderr."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("EDGETRAIN_DATA", str(files))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgetrain", *words])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, said.out, said.err.strip()

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing_behind(mistake: str, typed: Typed, files: Path) -> None:
    words, said = MISTAKES[mistake]
    before = sorted(files.rglob("*"))
    code, out, line = typed("fit", *words, "--device", "cpu", "--quiet")
    assert code == 2, line
    assert out == ""
    assert len(line.splitlines()) == 1
    assert line.startswith("edgetrain: ")
    assert all(word in line for word in said), line
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize("mistake", ["lbp-cae on flat rows", "predsim by micro-batches", "constant of another rule"])
def test_a_plan_refuses_the_same_mistakes(mistake: str, typed: Typed) -> None:
    words, said = MISTAKES[mistake]
    code, out, line = typed("plan", *words, "--device", "cpu")
    assert (code, out) == (2, "")
    assert all(word in line for word in said), line


@pytest.mark.parametrize(
    "words",
    [
        [*FEW, "--method", "mf", "--net", "mlp:4"],
        [*FLAT, "--method", "ff", "--net", "mlp:4", "--views", "2"],
        [*IMAGES, "--method", "lbp-cae", "--net", "cnn:2,2"],
        [*TEXTS, "--method", "mf", "--net", "mlp:4;embedding=3", "--cells", "1"],
        [*IMAGES, "--method", "bp", "--net", "mlp:4", "--augment", "flip , crop"],
        [*IMAGES, "--method", "mf", "--net", "mlp:4", "--augment", "flip", "--views", "2"],
    ],
    ids=lambda words: " ".join(words),
)
def test_what_is_no_mistake_trains(words: list[str], typed: Typed, files: Path) -> None:
    code, _, line = typed("fit", *words, "--epochs", "1", "--device", "cpu", "--quiet", "--run-dir", "r")
    assert code == 0, line
    assert (files / "r" / "record.json").is_file()
