"""What stands in a commit: positions, latents, and when it is due. ``pytest tests/training/test_commits.py``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from machine import data, settings

from edgetrain.errors import CorruptError
from edgetrain.planning.schedule import separate
from edgetrain.store.run import RunFolder
from edgetrain.stream.outputs import Sums
from edgetrain.training.caches import latents_of
from edgetrain.training.commits import Commits, Position
from edgetrain.training.job import open_job

VISITS = list(separate(3, 2, 5))


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"visits": None},
        {"visits": "3"},
        {"visits": -1},
        {"visits": 7},
        {"visits": True},
        {"visits": 2, "within": 3},
        {"visits": 2, "within": {}},
        {"visits": 2, "within": {"visit": 1, "step": 0, "sums": {}}},
        {"visits": 2, "within": {"visit": 6, "step": 0, "sums": {}}},
        {"visits": 2, "within": {"visit": 2, "step": 6, "sums": {}}},
        {"visits": 2, "within": {"visit": 2, "step": "1", "sums": {}}},
        {"visits": 2, "within": {"visit": 2, "step": 1, "sums": {"gold": 3}}},
        {"visits": 2, "within": {"visit": 2, "step": 1}},
        {"visits": 2, "within": {"visit": 2, "step": 3.5, "sums": {}}},
        {"visits": 2, "within": {"visit": 2, "step": 3, "sums": {"loss": "x"}}},
    ],
)
def test_a_position_that_the_schedule_does_not_have_is_corrupt(entry: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match="the journal's newest commit fits no run like this"):
        Position.of(entry, VISITS)


def test_positions_of_commits() -> None:
    assert Position.of({"visits": 6}, VISITS) == Position(6, 6, 0)
    sums = {"loss": 1.5, "samples": 32, "correct": 7, "scored": 32}
    within = {"visit": 3, "step": 2, "sums": sums}
    assert Position.of({"visits": 3, "within": within}, VISITS) == Position(3, 3, 2, Sums(**sums))
    assert Sums(**sums).means == (1.5 / 32, 7 / 32)


def test_commits_are_due_by_the_clock_their_cost_and_the_run_s_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = open_job(settings("mf"), data=data("pixels").set).work

    class Calm:
        def look(self) -> bool:
            return False

    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    nothing: Any = None

    def commits(every: float | None) -> Commits:
        folder = RunFolder(tmp_path)
        clock[0] = 100.0
        return Commits(folder, work.nodes, nothing, nothing, [], {}, {}, Calm(), every, 0.0, lambda: None)  # type: ignore[arg-type]

    def due(after: float, share: float, every: float | None = None, cost: float = 0.0) -> bool:
        found = commits(every)
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
        {"1": {**LATENTS, "rows": 70.0}},
        {"1": {**LATENTS, "streams": [{**LATENTS["streams"][0], "stream": "zz"}]}},
        {"1": {**LATENTS, "streams": [{**LATENTS["streams"][0], "shape": [0]}]}},
        {"1": {**LATENTS, "streams": [{**LATENTS["streams"][0], "shape": ["a"]}]}},
        {"1": {**LATENTS, "streams": [{**LATENTS["streams"][0], "written": 71}]}},
        {"1": {**LATENTS, "streams": [{**LATENTS["streams"][0], "written": -1}]}},
        {"1": {**LATENTS, "streams": [{**LATENTS["streams"][0], "file": "../x"}]}},
        {"1": {**LATENTS, "streams": [{**LATENTS["streams"][0], "sums": {"name": "/x", "checksum": "", "size": 1}}]}},
    ],
)
def test_latents_that_a_run_cannot_have_are_corrupt(entry: Any) -> None:
    work = open_job(settings("mf", schedule="sequence"), data=data("pixels").set).work
    assert len(latents_of({"1": LATENTS}, work)) == 1
    with pytest.raises(CorruptError, match="the journal's newest commit names no latents of this run"):
        latents_of(entry, work)
