"""Bytes flipped and files cut in a run's folder: found and named, or harmless; never a wrong result.

``EDGETRAIN_EXAMPLES=1000 pytest -s tests/training/test_damaged_runs.py``
"""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import assert_same, data, settings, units
from msgspec import structs
from safetensors.torch import load_file
from tiers import examples

from edgetrain.errors import CorruptError, EdgetrainError, InputError, Stopped
from edgetrain.store.entries import Checkpoint
from edgetrain.store.journal import Journal
from edgetrain.store.tensors import write_tensors
from edgetrain.training.edits import list_cells
from edgetrain.training.fit import fit
from edgetrain.training.run import Run
from edgetrain.training.stopping import Stop

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")
EXAMPLES = examples(15)


def asked() -> Any:
    return settings("lbp-ae", net="mlp:9,7", epochs=2, schedule="sequence", placement="stream", prefetch=0)


def rows() -> Any:
    return data("pixels").set


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    return fit(asked(), tmp_path / "run", data=rows())


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended within a visit, with latents that nobody can emit again."""
    questions = count()
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "asked", lambda self: next(questions) >= 7)
        with pytest.raises(Stopped):
            fit(asked(), tmp_path / "stopped", data=rows())
    return tmp_path / "stopped"


def damage(path: Path, draw: np.random.Generator) -> None:
    """Flip a bit, overwrite a byte, cut the file, or lengthen it."""
    content = bytearray(path.read_bytes())
    kind = draw.integers(0, 4) if content else 3
    at = int(draw.integers(0, max(1, len(content))))
    if kind == 0:
        content[at] ^= 1 << int(draw.integers(0, 8))
    elif kind == 1:
        content[at] = (content[at] + int(draw.integers(1, 256))) % 256
    elif kind == 2:
        content = content[:at]
    else:
        content += draw.integers(0, 256, int(draw.integers(1, 40)), np.uint8).tobytes()
    path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drawn(folder: Path, draw: np.random.Generator) -> Path:
    """A file, every kind about as often as every other."""
    found = files(folder)
    kinds = sorted({path.suffix or path.name for path in found})
    kind = kinds[int(draw.integers(0, len(kinds)))]
    of_kind = [path for path in found if (path.suffix or path.name) == kind]
    return of_kind[int(draw.integers(0, len(of_kind)))]


def said(error: EdgetrainError, folder: Path) -> None:
    line = str(error)
    assert "\n" not in line
    assert str(folder) in line, line
    assert error.exit_code in (2, 3, 4)


@pytest.mark.counted
def test_a_damaged_finished_run_is_read_right_or_refused(
    finished: Run, tmp_path: Path, figures: Callable[[str], None]
) -> None:
    draw, outcomes, kept = np.random.default_rng(1), Counter[str](), tmp_path / "kept"
    expected = finished.evaluate(rows())
    shutil.copytree(finished.path, kept)
    for _ in range(EXAMPLES):
        path = drawn(finished.path, draw)
        damage(path, draw)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                run = Run.open(finished.path)
                assert run.record == finished.record
                found = run.evaluate(rows())
                damaged = [cell.number for cell in list_cells(run) if cell.state != "ok"]
                if not told:  # it votes with all of its cells
                    assert found.accuracy == expected.accuracy
                    assert np.array_equal(found.scores["classifier"], expected.scores["classifier"])
                assert len(told) <= len(damaged)
                outcomes["told" if damaged else "harmless"] += 1
            except EdgetrainError as error:
                said(error, finished.path)
                outcomes["refused"] += 1
        shutil.copy2(kept / path.relative_to(finished.path), path)
    figures(f"finished run: {dict(outcomes)}")
    assert min(outcomes.values()) > EXAMPLES // 20 or EXAMPLES < 100


@pytest.mark.counted
def test_a_damaged_unfinished_run_goes_on_to_the_same_bits_or_is_refused(
    stopped: Path, finished: Run, tmp_path: Path, figures: Callable[[str], None]
) -> None:
    draw, outcomes, expected = np.random.default_rng(2), Counter[str](), units(finished.path)
    for _ in range(EXAMPLES):
        folder = tmp_path / "damaged"
        shutil.copytree(stopped, folder)
        damage(drawn(folder, draw), draw)
        try:
            run = fit(asked(), folder, data=rows(), resume=True)
            assert_same(units(folder), expected)
            assert run.record.votes == finished.record.votes
            outcomes["same bits"] += 1
        except EdgetrainError as error:
            said(error, folder)
            outcomes["refused"] += 1
        shutil.rmtree(folder)
    figures(f"unfinished run: {dict(outcomes)}")
    assert min(outcomes["same bits"], outcomes["refused"]) > EXAMPLES // 20 or EXAMPLES < 100


@pytest.mark.parametrize("keeps", [False, True])
def test_what_a_killed_process_left_of_a_finished_run_is_removed(keeps: bool, tmp_path: Path) -> None:
    given = replace(asked(), keep_latents=keeps)
    run = fit(given, tmp_path / "run", data=rows())
    for name in ("latents/000.x.rows", "scratch/000.safetensors"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(b"left")
    fit(given, run.path, data=rows(), resume=True)
    assert (run.path / "latents/000.x.rows").exists() == keeps
    assert (run.path / "scratch").exists() == keeps


@pytest.mark.parametrize("member", ["cells", "figures", "latents", "record.json", "report.html", "config.toml"])
def test_a_link_in_the_place_of_a_member_is_not_followed(member: str, tmp_path: Path) -> None:
    run = fit(asked(), tmp_path / "run", data=rows())
    outside = tmp_path / "outside"
    if (run.path / member).exists():
        (run.path / member).rename(outside)
    else:
        outside.mkdir()
    before = sorted(outside.rglob("*")) if outside.is_dir() else outside.read_bytes()
    (run.path / member).symlink_to(outside)
    for act in (
        lambda: Run.open(run.path),
        lambda: run.report(),
        lambda: list_cells(run),
        lambda: fit(asked(), run.path, data=rows(), resume=True),
        lambda: fit(asked(), run.path, data=rows(), force=True),
    ):
        with pytest.raises(CorruptError, match=f"{member}: is a link"):
            act()
    assert (sorted(outside.rglob("*")) if outside.is_dir() else outside.read_bytes()) == before


@pytest.mark.parametrize(
    "change", [lambda w: w[:1], lambda w: w.double(), lambda w: w.to(torch.int8), lambda w: w.flatten()]
)
def test_forged_weights_with_a_right_checksum_are_refused_by_shape_and_dtype(change: Any, tmp_path: Path) -> None:
    run = fit(asked(), tmp_path / "run", data=rows())
    entries = list(Journal(run.path / "journal.jsonl").entries())
    at, last = [(at, entry) for at, entry in enumerate(entries) if isinstance(entry, Checkpoint)][-1]
    name = last.files["000"]["weights"].name
    weights = {key: change(value) for key, value in load_file(run.path / "cells" / name).items()}
    forged = write_tensors(run.path / "cells" / name, weights, {})
    entries[at] = structs.replace(last, files={**last.files, "000": {"weights": forged}})
    (run.path / "journal.jsonl").unlink()
    for entry in entries:
        Journal(run.path / "journal.jsonl").append(entry)
    said = "the saved weights do not fit this net: they have|expected torch.float32"
    with pytest.raises((CorruptError, InputError), match=said):
        Run.open(run.path).evaluate(rows())
