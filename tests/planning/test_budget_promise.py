"""Whatever a plan accepts runs within the budget; the smallest budget it names is the smallest.

``pytest tests/planning/test_budget_promise.py``; ``EDGETRAIN_EXAMPLES=100`` tries more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiers import examples

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.base import DataSet
from edgetrain.errors import BudgetError, EdgetrainError, InputError
from edgetrain.stream.optimizers import OPTIMIZERS
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.training.methods import METHODS
from edgetrain.units import ceil_mb, to_mb

MIB, CLASSES, SIDE = 1 << 20, 3, 8
EXAMPLES = examples(1)


def data(rows: int) -> DataSet:
    draw = np.random.default_rng(1)
    x, y = draw.integers(0, 256, (rows + 7, SIDE, SIDE), dtype=np.uint8), np.arange(rows + 7) % CLASSES
    return from_arrays((x[:rows], y[:rows]), (x[rows:], y[rows:]))


@st.composite
def nets(draw: st.DrawFn, method: str) -> str | None:
    if method == "slp":
        return None
    if method == "sll+":
        return f"vit:depth={draw(st.integers(1, 2))},width={4 * draw(st.integers(1, 6))},heads=2,patch=4"
    cnn = f"cnn:{draw(st.integers(1, 9))},{draw(st.integers(1, 9))}"
    if method == "lbp-cae":
        return cnn
    widths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    mlp = f"mlp:{','.join(map(str, widths))}"
    return draw(st.sampled_from([mlp, mlp, cnn]))


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    method = draw(st.sampled_from(list(METHODS)))
    batch = draw(st.integers(2, 24))
    values: dict[str, Any] = {
        "method": method,
        "net": draw(nets(method)),
        "batch_size": batch,
        "optimizer": draw(st.sampled_from(OPTIMIZERS)),
        "epochs": draw(st.integers(1, 2)),
        "lr": 1e-4,
    }
    if METHODS[method].defaults.schedule is not None:
        values["schedule"] = draw(st.sampled_from(["separate", "sequence"]))
    if METHODS[method].classifier == "last" and draw(st.booleans()):
        values["classifier_epochs"] = values["epochs"]
    return values, 2 * batch + draw(st.integers(2, batch))


def asked(values: dict[str, Any], budget: int | None = None) -> Settings:
    limits = {} if budget is None else {"max_gpu_mb": budget / MIB}
    fixed = {"threads": 1, "device": "cpu", "meter": "full", "seed": 1}
    return Settings().with_values({**fixed, **{key: value for key, value in values.items() if value}, **limits})


@pytest.mark.counted
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(given=runs(), share=st.floats(0.3, 1.1))
def test_the_budget_is_kept_and_the_smallest_is_the_smallest(
    tmp_path_factory: pytest.TempPathFactory, given: tuple[dict[str, Any], int], share: float
) -> None:
    values, rows = given
    rows_of = data(rows)
    free = plan_job(open_job(asked(values), data=rows_of))
    budget = max(int(share * free.predicted_peak), 1)
    job = open_job(asked(values, budget), data=rows_of)
    plan = plan_job(job)
    path = tmp_path_factory.mktemp("promise") / "run"
    coupled = any(job.work.couples_batch(index) for index in range(job.work.depth))
    if plan.fits:
        record = fit(asked(values, budget), path, data=rows_of).record
        assert record.peak_gpu_mb is not None
        assert record.peak_gpu_mb == to_mb(plan.predicted_peak)
        assert plan.predicted_peak <= budget
        return
    with pytest.raises(InputError if coupled and plan.whole_batch else BudgetError):
        fit(asked(values, budget), path, data=rows_of)
    assert not path.exists()
    least = plan.min_budget
    record = fit(asked(values, least), path, data=rows_of).record
    assert record.peak_gpu_mb is not None
    assert record.peak_gpu_mb <= ceil_mb(least)
    below = int(0.99 * least)
    assert not plan_job(open_job(asked(values, below), data=rows_of)).fits
    with pytest.raises(EdgetrainError):
        fit(asked(values, below), path.with_name("below"), data=rows_of)
