"""Records as JSON. ``pytest tests/test_record.py``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import ValidationError, convert

from edgetrain.record import CellRecord, MemorySeries, RunRecord


def full() -> RunRecord:
    cell = CellRecord("linear 4-3", 12, 2, 0.5, None, 0.9, 1.5, 1.5, 3.0, 0.1, 1, 16, [0.7, 0.5], [None, 0.8])
    series = MemorySeries("linear 4-3", 1, 1.5, "aten.mm", [[1.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
    record = RunRecord("runs/a", "mf", "separate", "cpu", 0, rows=10, epochs=2, test_accuracy=0.9)
    record.votes = {"sum": 0.9, "cells": [0.9]}
    record.cells, record.memory, record.bp_memory, record.energy_j = [cell], [series], series, 40.0
    return record


def test_a_record_comes_back_from_its_json() -> None:
    for record in (full(), RunRecord("runs/a", "bp", None, "cpu", 0)):
        assert convert(json.loads(json.dumps(record.as_dict())), RunRecord) == record


def test_whole_numbers_are_numbers() -> None:
    assert convert({"name": "a", "params": 1, "seconds": 3}, CellRecord).seconds == 3


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "0"},
        {"seed": True},
        {"seconds": "long"},
        {"seconds": None},
        {"cells": {}},
        {"cells": [3]},
        {"cells": [{"name": "a"}]},
        {"cells": [{"name": "a", "params": 1, "losses": "abc"}]},
        {"cells": [{"name": "a", "params": 1, "losses": ["abc"]}]},
        {"cells": [{"name": "a", "params": 1, "more": 1}]},
        {"memory": [[]]},
        {"memory": [{"name": "a", "count": 1, "peak_mb": 1.0, "peak_at": "x", "mb": [3.0]}]},
        {"bp_memory": []},
        {"votes": []},
        {"method": None},
        {"unheard": 1},
    ],
)
def test_what_is_no_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        convert(full().as_dict() | change, RunRecord)


def test_joules_of_an_epoch_and_of_a_sample() -> None:
    record = full()
    assert record.joules_per_epoch == 20.0
    assert record.joules_per_sample == 2.0
    record.energy_j = None
    assert record.joules_per_epoch is record.joules_per_sample is None
    assert RunRecord("a", "bp", None, "cpu", 0, energy_j=3.0).joules_per_epoch is None
