"""What a checkpoint holds: positions, latents, and when it is due. ``pytest tests/training/test_checkpointing.py``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from machine import data, settings
from msgspec import ValidationError, convert, json

from edgetrain.errors import CorruptError
from edgetrain.planning.schedule import separate
from edgetrain.record import Sums
from edgetrain.store.entries import Checkpoint, Within
from edgetrain.store.run import RunFolder
from edgetrain.training.checkpointing import Checkpoints, Digests, Position
from edgetrain.training.job import open_job
from edgetrain.training.latent_cache import check_latents

VISITS = list(separate(3, 2, 5))


@pytest.mark.parametrize(
    "entry",
    [
        {"visits": 7},
        {"visits": 2, "within": {"visit": 1, "step": 0, "sums": {}}},
        {"visits": 2, "within": {"visit": 6, "step": 0, "sums": {}}},
        {"visits": 2, "within": {"visit": 2, "step": 6, "sums": {}}},
    ],
)
def test_a_position_that_the_schedule_does_not_have_is_corrupt(entry: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match="the newest checkpoint does not fit this run"):
        Position.of(convert({"type": "checkpoint", "number": 1, **entry}, Checkpoint), VISITS)


@pytest.mark.parametrize(
    "entry",
    [
        {"visits": None},
        {"visits": "3"},
        {"visits": -1},
        {"visits": True},
        {"within": 3},
        {"within": {}},
        {"within": {"visit": 2, "step": "1", "sums": {}}},
        {"within": {"visit": 2, "step": 1}},
        {"within": {"visit": 2, "step": 3.5, "sums": {}}},
        {"within": {"visit": 2, "step": 3, "sums": {"loss": "x"}}},
        {"within": {"visit": 2, "step": 3, "sums": {"scored": -1}}},
        {"cells": [{"name": "a"}]},
        {"cells": [{"name": "a", "params": 1, "losses": 3}]},
        {"totals": {"energy": "much"}},
        {"number": 0.5},
    ],
)
def test_a_checkpoint_of_other_types_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        convert({"type": "checkpoint", "number": 1, **entry}, Checkpoint)


def test_positions_of_checkpoints() -> None:
    assert Position.of(Checkpoint(number=1, visits=6), VISITS) == Position(6, 6, 0)
    sums = Sums(1.5, 32, 7, 32)
    position = Position(3, 3, 2, sums)
    assert position.within(VISITS) == Within(3, 2, sums)
    assert Position.of(Checkpoint(number=1, visits=3, within=position.within(VISITS)), VISITS) == position
    assert Position.before(3, VISITS).within(VISITS) is None
    assert sums.means == (1.5 / 32, 7 / 32)


def test_checkpoints_are_due_by_the_clock_their_cost_and_the_run_s_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = open_job(settings("mf"), data=data("pixels").set).work

    class Calm:
        def look(self) -> bool:
            return False

    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    nothing: Any = None

    def checkpoints(every: float | None) -> Checkpoints:
        folder = RunFolder(tmp_path)
        clock[0] = 100.0
        return Checkpoints(
            folder, work.nodes, nothing, nothing, [], {}, Digests("", None), Calm(), every, 0.0, lambda: None
        )  # type: ignore[arg-type]

    def due(after: float, share: float, every: float | None = None, cost: float = 0.0) -> bool:
        found = checkpoints(every)
        found._cost_s, clock[0] = cost, 100.0 + after
        return found.due(share)

    assert not due(59.0, 0.9)
    assert due(61.0, 0.9)
    assert not due(61.0, 0.01)  # of 6100 seconds 5% are 305
    assert due(310.0, 310 / 6100)
    assert not due(61.0, 0.9, cost=3.0)  # 3% of the time: at most every 100 seconds
    assert due(101.0, 0.9, cost=3.0)
    assert due(2.0, 0.9, every=1.5, cost=3.0)
    assert not due(1.0, 0.9, every=1.5)


LATENTS: dict[str, Any] = {
    "rows": 70,
    "first": 0,
    "step_order": True,
    "streams": [
        {
            "stream": "x",
            "file": "001.x.rows",
            "shape": [23],
            "written": 32,
            "sums": {"name": "001.x.1.sums", "checksum": "0", "size": 8},
        }
    ],
}


STREAM: dict[str, Any] = LATENTS["streams"][0]


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {"1": 3},
        {"x": LATENTS},
        {"0": LATENTS},
        {"9": LATENTS},
        {"1": {**LATENTS, "rows": 1 << 60}},
        {"1": {**LATENTS, "rows": "70"}},
        {"1": {**LATENTS, "first": -1}},
        {"1": {**LATENTS, "first": 70}},
        {"1": {**LATENTS, "streams": [3]}},
        {"1": {**LATENTS, "rows": 70.5}},
        {"1": {**LATENTS, "streams": [{**STREAM, "stream": "zz"}]}},
        {"1": {**LATENTS, "streams": [{**STREAM, "shape": [0]}]}},
        {"1": {**LATENTS, "streams": [{**STREAM, "shape": ["a"]}]}},
        {"1": {**LATENTS, "streams": [{**STREAM, "written": 71}]}},
        {"1": {**LATENTS, "streams": [{**STREAM, "written": -1}]}},
        {"1": {**LATENTS, "streams": [{**STREAM, "file": "../x"}]}},
        {"1": {**LATENTS, "streams": [{**STREAM, "sums": {"name": "/x", "checksum": "", "size": 1}}]}},
    ],
)
def test_latents_that_a_run_cannot_have_are_refused(entry: Any) -> None:
    work = open_job(settings("mf", schedule="sequence"), data=data("pixels").set).work

    def read(latents: Any) -> None:
        entry = json.encode({"type": "checkpoint", "number": 1, "latents": latents})
        check_latents(json.decode(entry, type=Checkpoint).latents, work)

    read({"1": LATENTS})
    with pytest.raises((CorruptError, ValidationError), match="the newest checkpoint does not fit this run|Expected"):
        read(entry)
