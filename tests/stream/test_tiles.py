"""A cell in tiles is the whole cell: same steps, same latents, same scores, up to the order of summation."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from machine import flat, in_double, named, reader_of, train_steps
from tiers import examples

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.errors import BudgetError, InputError
from edgetrain.nets.spec import open_net
from edgetrain.objectives import OBJECTIVES
from edgetrain.objectives.base import nodes
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import ResidentCell, Setup
from edgetrain.stream.inputs import training_inputs
from edgetrain.stream.latents import DeviceLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.span import Span
from edgetrain.stream.tiles import TILE_MULTIPLE, TiledCell, ranges_of
from edgetrain.training.config_file import settings_of
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.training.run import Run
from edgetrain.units import ceil_mb

CPU = torch.device("cpu")
TILED = ["mf", "lbp-ae", "sll", "ff", "symba"]
ROWS, BATCH, CLASSES, SEED = 37, 16, 4, 6


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@given(st.integers(1, 5000), st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_ranges_cover_the_units_in_multiples_and_are_no_more_than_asked(units, tiles):
    found = ranges_of(units, tiles)
    assert [cut.start for cut in found] == [0, *(cut.stop for cut in found[:-1])]
    assert found[-1].stop == units
    assert len(found) <= tiles
    assert all((cut.stop - cut.start) % TILE_MULTIPLE == 0 for cut in found[:-1])
    assert ranges_of(units, len(found)) == found  # so that a plan's number means the same everywhere


def chain(method, width=50, inputs=9):
    recipes = open_net(f"mlp:{width},8", (inputs,), OBJECTIVES[method].net_defaults)
    objective = OBJECTIVES[method](CLASSES, recipes.options)
    return objective, nodes(list(recipes.cells), (inputs,), SEED)


def doubled(objective):
    """A reader of random inputs, float64, as the rule's first cell reads them."""
    draw, first = torch.Generator().manual_seed(2), training_inputs(objective)
    latents = DeviceLatents(ROWS, "float32", False)
    latents.put(0, {"x": torch.rand(ROWS, 9, generator=draw)})
    y = torch.randint(0, CLASSES, (ROWS,), generator=draw)
    return reader_of(latents, y, prepare=lambda streams, y, draws: first({"x": streams["x"].double()}, y, draws))


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.rows = {}

    def put(self, first, streams):
        for name, values in streams.items():
            for row, value in enumerate(values, first):
                self.rows[name, row] = value.clone()

    def close(self): ...


@pytest.mark.parametrize("micro", [BATCH, 5])
@pytest.mark.parametrize("tiles", [2, 3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax", "sgd"])
@pytest.mark.parametrize("method", TILED)
def test_steps_in_tiles_are_the_whole_cells_in_float64(method, optimizer, tiles, micro):
    objective, (node, _) = chain(method)
    setup = Setup(objective, OptimizerRecipe(optimizer, 1e-2, 1e-2), CPU)
    first = in_double(ResidentCell(node, setup).state_dict())
    order = np.random.default_rng(1).permutation(ROWS)
    whole, cut = ResidentCell(node, setup, first), TiledCell(node, setup, tiles, first)
    for module in (whole.head, cut.fixed()):
        if module is not None:
            module.double()
    made_tile = cut.tile

    def tile(number):
        made = made_tile(number)
        if made.head is not None:
            made.head.double()  # sll's fixed projection
        return made

    cut.tile = tile
    seen = []
    for cell in (whole, cut):
        sink = Kept()
        sums = train_steps(cell, doubled(objective), Span(ROWS, BATCH, micro, 0, 3, order), sink)
        seen.append((flat(cell.state_dict()), sink.rows, sums.means))
    (expected, latents, told), (found, tiled_latents, tiled_told) = seen
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert sorted(tiled_latents) == sorted(latents)
    for key, value in latents.items():
        torch.testing.assert_close(tiled_latents[key].double(), value, rtol=1e-6, atol=1e-6)  # rows wait as float32
    assert tiled_told[0] == pytest.approx(told[0], rel=1e-6)  # losses are summed in float32
    assert tiled_told[1] == told[1]


def toy(rows=90, width=20):
    draw = np.random.default_rng(0)
    y = np.arange(rows) % CLASSES
    return (draw.integers(60, 190, (CLASSES, width))[y] + draw.integers(-50, 50, (rows, width))).astype(np.uint8), y


def run(path, method, **values):
    standard = {"net": "mlp:70,33", "epochs": 2, "batch_size": BATCH, "threads": 1, "device": "cpu", "meter": "full"}
    given = Settings().with_values({"method": method, **standard, **values})
    return fit(given, path, data=from_arrays(toy(), toy(40), reading=Reading("image")))


def tensors(path):
    folder = RunFolder(path)
    files = folder.files()
    return {f"{unit}/{name}": value for unit in files for name, value in named(folder.units.read(files[unit])).items()}


@pytest.mark.parametrize("schedule", ["separate", "sequence"])
@pytest.mark.parametrize("method", TILED)
def test_a_run_in_tiles_is_the_run_without_and_takes_what_was_predicted(tmp_path, method, schedule):
    more = {"classifier_epochs": 2} if method in ("ff", "sll") else {}
    whole = run(tmp_path / "whole", method, schedule=schedule, optimizer="sgd", lr=0.05, **more)
    tiled = run(tmp_path / "tiled", method, schedule=schedule, optimizer="sgd", lr=0.05, tiles=3, **more)
    assert [cell.tiles for cell in tiled.record.cells] == [3, 3]
    found, expected = tensors(tmp_path / "tiled"), tensors(tmp_path / "whole")
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert tiled.record.peak_gpu_mb == tiled.record.predicted_peak_mb
    assert tiled.record.peak_gpu_mb < whole.record.peak_gpu_mb
    rows = toy(25)[0]
    np.testing.assert_allclose(tiled.scores(rows), whole.scores(rows), rtol=1e-4, atol=1e-5)
    tiled.latents(rows, tmp_path / "a.npy")
    whole.latents(rows, tmp_path / "b.npy")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_in_tiles_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    run(tmp_path / "whole", "mf", tiles=2)
    save, path = RunFolder.save, tmp_path / "cut"

    def saves_and_dies(folder, *arguments):
        save(folder, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save", saves_and_dies)
        run(path, "mf", tiles=2, checkpoint_every=0.0)
    fit(settings_of(path), path, data=from_arrays(toy(), toy(40), reading=Reading("image")), resume=True)
    found, expected = tensors(path), tensors(tmp_path / "whole")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", TILED)
def test_a_cell_of_many_times_the_budget_trains_within_it(tmp_path, method):
    values = {"net": "mlp:1500", "epochs": 1}
    whole = run(tmp_path / "whole", method, **values)
    budget = whole.record.peak_gpu_mb / 5
    tiled = run(tmp_path / "tiled", method, max_gpu_mb=budget, **values)
    assert tiled.record.cells[0].tiles > 1
    assert tiled.record.peak_gpu_mb <= budget
    assert abs(tiled.record.test_accuracy - whole.record.test_accuracy) < 0.06
    assert tiled.record.test_accuracy in Run.open(tmp_path / "tiled").evaluate(toy(40)).accuracy.values()


@pytest.mark.counted
@given(
    st.sampled_from(TILED),
    st.integers(1, 120),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(["adam", "adamw", "adamax", "sgd"]),
    st.floats(0.15, 1.2),
)
@settings(max_examples=examples(2), deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_what_a_plan_accepts_runs_within_the_budget_and_its_least_budget_is_the_least(
    tmp_path_factory, method, width, inputs, batch, optimizer, share
):
    values = {
        "method": method, "net": f"mlp:{width}", "epochs": 1, "batch_size": batch, "optimizer": optimizer,
        "threads": 1, "device": "cpu", "meter": "full", "lr": 1e-3,
    }  # fmt: skip
    features = max(inputs, 2 * CLASSES)  # ff needs room for the label
    data = from_arrays(toy(2 * batch + 5, features), toy(11, features), reading=Reading("image"))
    free = plan_job(open_job(Settings().with_values(values), data=data))
    budget = max(free.predicted_peak * share, 1024) / (1 << 20)
    asked = Settings().with_values({**values, "max_gpu_mb": budget})
    plan = plan_job(open_job(asked, data=data))
    path = tmp_path_factory.mktemp("run") / "run"
    if plan.fits:
        record = fit(asked, path, data=data).record
        assert record.peak_gpu_mb == record.predicted_peak_mb <= ceil_mb(int(budget * (1 << 20)))
        return
    with pytest.raises((BudgetError, InputError)):
        fit(asked, path, data=data)
    least = Settings().with_values({**values, "max_gpu_mb": plan.min_budget / (1 << 20)})
    assert plan_job(open_job(least, data=data)).fits
    below = Settings().with_values({**values, "max_gpu_mb": plan.min_budget * 0.99 / (1 << 20)})
    assert not plan_job(open_job(below, data=data)).fits


@pytest.mark.parametrize(
    ("method", "net"),
    [("predsim", "mlp:70"), ("lbp-dae", "mlp:70"), ("lbp-gan", "mlp:70"), ("mf", "mlp:70;norm=batch"),
     ("mf", "mlp:70;dropout=0.2")],
)  # fmt: skip
def test_tiles_are_refused_where_they_would_not_be_exact(tmp_path, method, net):
    with pytest.raises(InputError, match="cannot be trained in tiles"):
        run(tmp_path / "run", method, net=net, tiles=2)
    with pytest.raises((BudgetError, InputError), match=r"cannot be trained in tiles|state --batch-size"):
        run(tmp_path / "run", method, net=net, max_gpu_mb=0.004)
    assert not (tmp_path / "run").exists()


def test_sll_with_a_mask_is_not_tiled(tmp_path):
    with pytest.raises(InputError, match="cannot be trained in tiles"):
        run(tmp_path / "run", "sll", constants="dropout=0.1", tiles=2)


def test_a_tiled_cell_needs_the_room_of_its_tiles_only():
    objective, (node, _) = chain("mf", width=640)
    cell = TiledCell(node, Setup(objective, OptimizerRecipe("adam", 1e-3), CPU), 10)
    assert cell.tiles == 10
    held = sum(prod(value.shape) for value in cell.tile(3).state().module.values())
    assert held == 64 * 9
