"""A last batch of one row, and the batch sizes that refusals name: whatever is accepted trains."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.errors import BudgetError, InputError
from edgetrain.planning.planner import require_fit
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job


def rows_of(rows, shape):
    x = np.random.default_rng(0).integers(0, 256, (rows + 3, *shape), dtype=np.uint8)
    y = np.arange(rows + 3) % 3
    return from_arrays((x[:rows], y[:rows]), (x[rows:], y[rows:]))


def settings(net, **values):
    spec = net if isinstance(net, str) else "modules"
    return Settings().with_values({"net": spec, "epochs": 1, "device": "cpu", "threads": 1, **values})


def own(*modules):
    return [nn.Sequential(*modules), nn.Linear(4, 3)]


NETS = {
    "pooled to one pixel": ("cnn:4,8,8;norm=batch", (8, 8), {}),
    "pooled to one pixel, whole net": ("cnn:4,8,8;norm=batch", (8, 8), {"method": "bp"}),
    "dense": ("mlp:8,6;norm=batch", (6,), {}),
    "dense, whole net": ("mlp:8,6;norm=batch", (6,), {"method": "bp"}),
    "dense, feedback alignment": ("mlp:8,6;norm=batch", (6,), {"method": "dfa"}),
    "no normalisation": ("mlp:8,6", (6,), {}),
    "own, inside a cell": (own(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), (6,), {}),
    "own, several values a channel": (
        own(nn.Linear(6, 4), nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.Flatten()), (6,), {},
    ),
    "own, whole net": (own(nn.Linear(6, 4), nn.BatchNorm1d(4)), (6,), {"method": "bp"}),
}  # fmt: skip
CAN = {"pooled to one pixel", "pooled to one pixel, whole net", "no normalisation", "own, several values a channel"}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("rows", "batch"), [(33, 16), (17, 4), (7, 1), (9, 8)])
def test_a_last_batch_of_one_row_trains_or_the_batch_that_the_refusal_names_does(name, rows, batch, tmp_path):
    net, shape, values = NETS[name]
    given = None if isinstance(net, str) else net
    if name in CAN:
        fit(settings(net, batch_size=batch, **values), tmp_path / "run", given, rows_of(rows, shape))
        return
    with pytest.raises(InputError, match=f"leaves a last batch of one of the {rows} rows") as refused:
        fit(settings(net, batch_size=batch, **values), tmp_path / "run", given, rows_of(rows, shape))
    assert not (tmp_path / "run").exists()
    named = int(re.search(r"state --batch-size (\d+)$", str(refused.value))[1])
    fit(settings(net, batch_size=named, **values), tmp_path / "run", given, rows_of(rows, shape))


def test_a_single_row_cannot_be_normalised_in_any_batch():
    two = from_arrays((np.ones((2, 6), np.float32), np.arange(2)))
    job = open_job(settings("mlp:8;norm=batch"), data=two)
    with pytest.raises(InputError, match="no other batch size fits$"):
        plan_job(replace(job, work=replace(job.work, rows=1)))


@pytest.mark.parametrize("method", ["bp", "mf"])
@pytest.mark.parametrize("rows", [129, 257, 1025])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_a_batch_named_for_its_size_is_accepted(method, rows, share):
    values, data = {"method": method, "batch_size": 300}, rows_of(rows, (6,))
    net = "mlp:100;norm=batch"
    free = plan_job(open_job(settings(net, **values), data=data)).predicted_peak
    limit = {"max_gpu_mb": share * free / (1 << 20)}
    with pytest.raises((InputError, BudgetError)) as refused:
        require_fit(plan_job(open_job(settings(net, **values, **limit), data=data)))
    if isinstance(refused.value, BudgetError):
        assert str(refused.value).endswith("no smaller --batch-size fits")
        return
    named = int(re.search(r"state --batch-size (\d+)$", str(refused.value))[1])
    require_fit(plan_job(open_job(settings(net, **{**values, "batch_size": named}, **limit), data=data)))
