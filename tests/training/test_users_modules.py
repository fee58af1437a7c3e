"""Nets that a user brings, trained: what trains is what was given. ``pytest tests/training/test_users_modules.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from machine import stopping_after
from torch import Tensor, nn
from torch.nn import functional

import edgetrain
from edgetrain.errors import BudgetError, InputError, Stopped
from edgetrain.training.callbacks import Callback
from edgetrain.training.stopping import Stop

ROWS, WIDTH, CLASSES = 64, 6, 3
FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu", "lr": 1e-2}
WAYS = [("mf", "separate"), ("mf", "sequence"), ("predsim", None), ("ff", "sequence")]


def rows(width: int = WIDTH) -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    y = draw.integers(0, CLASSES, ROWS)
    y[:CLASSES] = np.arange(CLASSES)
    return (draw.normal(size=(CLASSES, width))[y] * 2 + draw.normal(size=(ROWS, width))).astype(np.float32), y


def dense(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def fit(net: Any, path: Path, method: str = "mf", schedule: str | None = None, **values: Any) -> edgetrain.Run:
    named = {} if schedule is None else {"schedule": schedule}
    return edgetrain.fit(net, rows(), method, run_dir=path, **{**FAST, **named, **values})


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_frozen_cell_has_no_learning_rate_to_change(tmp_path: Path) -> None:
    net = [dense(WIDTH, 12).requires_grad_(False), dense(12, 8)]
    trained = fit(net, tmp_path / "run", "dfa", lr_schedule="cosine").cells()
    assert same(values(trained[0][0]), values(net[0]))
    bare = fit([nn.Flatten(), net[0]], tmp_path / "bare", "bp-stream", lr_schedule="one-cycle")
    assert bare.record.peak_gpu_mb == bare.record.predicted_peak_mb


@pytest.mark.parametrize(("method", "schedule"), WAYS)
def test_frozen_weights_do_not_move(method: str, schedule: str | None, tmp_path: Path) -> None:
    partly = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    partly[0].requires_grad_(False)
    net = [dense(WIDTH, 12).requires_grad_(False), partly, dense(12, 8)]
    trained = fit(net, tmp_path / "run", method, schedule).cells()
    assert same(values(trained[0]), values(net[0]))
    assert torch.equal(trained[1][0].weight, partly[0].weight)
    assert not torch.equal(trained[1][2].weight, partly[2].weight)
    assert not torch.equal(trained[2][0].weight, net[2][0].weight)


@pytest.mark.parametrize("schedule", ["separate", "sequence"])
def test_a_mask_on_gradients_is_kept_when_cells_come_and_go(schedule: str, tmp_path: Path) -> None:
    net = [dense(WIDTH, 12), dense(12, 8)]
    masks = [(torch.rand(cell[0].weight.shape) > 0.5).float() for cell in net]
    for cell, mask in zip(net, masks, strict=True):
        cell[0].weight.data.mul_(mask)
        cell[0].weight.register_hook(lambda g, mask=mask: g * mask)
    trained = fit(net, tmp_path / "run", schedule=schedule, max_host_mb=64).cells()
    for cell, before, mask in zip(trained, net, masks, strict=True):
        assert bool((cell[0].weight[mask == 0] == 0).all())
        assert bool((cell[0].weight[mask == 1] != before[0].weight[mask == 1]).any())


def test_frozen_batch_norm_in_evaluation_mode_stays_so(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(8)
    norm.running_mean.fill_(0.5)
    first = nn.Sequential(nn.Linear(WIDTH, 8), norm.requires_grad_(False).eval(), nn.ReLU())
    trained = fit([first, dense(8, 8)], tmp_path / "run", schedule="sequence", micro_batch=4).cells()
    assert same(values(trained[0][1]), values(norm))
    assert not torch.equal(trained[0][0].weight, first[0].weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("optimizer", ["adam", "adamax", "sgd"])
@pytest.mark.parametrize("schedule", ["separate", "sequence"])
def test_tied_weights_of_a_cell_stay_tied_and_train_as_in_plain_pytorch(
    schedule: str, optimizer: str, tmp_path: Path
) -> None:
    cell = Tied()
    run = fit([cell, dense(WIDTH, 5)], tmp_path / "run", schedule=schedule, optimizer=optimizer)
    trained = run.cells()[0]
    assert trained.b.weight is trained.a.weight
    assert not torch.equal(trained.a.weight, cell.a.weight)
    assert run.record.cells[0].params == WIDTH * WIDTH + WIDTH + CLASSES * WIDTH
    untied = Tied()
    untied.load_state_dict(cell.state_dict())
    untied.b.weight = nn.Parameter(cell.a.weight.detach().clone())
    other = fit([untied, dense(WIDTH, 5)], tmp_path / "untied", schedule=schedule, optimizer=optimizer).cells()[0]
    assert not torch.allclose(other.a.weight, trained.a.weight)
    again = edgetrain.open_run(run.path, [cell, dense(WIDTH, 5)])
    assert np.array_equal(again.predict(rows()[0]), run.predict(rows()[0]))


def shared_net() -> list[nn.Module]:
    torch.manual_seed(3)
    one, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    other.weight = one.weight
    return [nn.Sequential(one, nn.ReLU()), nn.Sequential(other, nn.ReLU())]


def test_weights_shared_between_cells_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.weight of cell 2 is 0\.weight of cell 1"):
        fit(shared_net(), tmp_path / "run")
    twice = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(InputError, match="of cell 2 is weight of cell 1"):
        fit([twice, twice], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["bp", "bp-checkpoint"])
def test_backpropagation_trains_shared_weights_as_plain_pytorch_does(method: str, tmp_path: Path) -> None:
    trained = fit(shared_net(), tmp_path / "run", method, optimizer="sgd", epochs=1, batch_size=ROWS).cells()[0]
    assert trained[1][0].weight is trained[0][0].weight
    plain = nn.Sequential(*shared_net())
    from edgetrain.keys import seeded

    with seeded(0, "head", 0):
        head = nn.Linear(WIDTH, CLASSES, bias=False)
    x, y = (torch.from_numpy(value) for value in rows())
    x = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    functional.cross_entropy(head(plain(x.float())), y).backward()
    torch.optim.SGD([*plain.parameters(), *head.parameters()], lr=FAST["lr"]).step()
    torch.testing.assert_close(trained[0][0].weight, plain[0][0].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["mf", "predsim", "sll", "bp", "bp-checkpoint", "bp-offload"])
def test_in_place_activations_train_like_others(method: str, tmp_path: Path) -> None:
    def net(inplace: bool) -> list[nn.Module]:
        torch.manual_seed(1)
        second = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(8, 8))
        return [nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU()), second, nn.Sequential(nn.Dropout(0.0), nn.ReLU(inplace))]

    one, other = (fit(net(inplace), tmp_path / str(inplace), method).cells() for inplace in (True, False))
    assert same(values(one), values(other))


class Reads(nn.Module):
    """Reads a value of its input, which fake tensors do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if x.detach().abs().max().item() > 1e9 else 1.0)


def test_a_module_that_reads_values_is_planned_and_trained(tmp_path: Path) -> None:
    plain = Reads()
    run = fit([plain, dense(8, 8)], tmp_path / "run", max_gpu_mb=4)
    linear = nn.Linear(WIDTH, 8)
    linear.load_state_dict(plain.linear.state_dict())
    other = fit([linear, dense(8, 8)], tmp_path / "linear", max_gpu_mb=4)
    assert torch.equal(run.cells()[0].linear.weight, other.cells()[0].weight)
    assert run.record.peak_gpu_mb <= run.record.predicted_peak_mb


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 400)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return (z - z.mean(0)).relu()


def test_a_budget_does_not_split_batches_whose_samples_influence_each_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = [Centred(), dense(400, 4)]
    roomy = fit(net, tmp_path / "roomy", batch_size=ROWS)
    with pytest.raises((InputError, BudgetError)):
        fit(net, tmp_path / "tight", batch_size=ROWS, max_gpu_mb=0.9 * roomy.record.predicted_peak_mb)
    with pytest.raises(InputError, match="influence each other in cell"):
        fit(net, tmp_path / "tight", batch_size=ROWS, micro_batch=8)
    assert not (tmp_path / "tight").exists()


class Named(nn.Module):
    """Its submodule has the name of a kind of state."""

    def __init__(self) -> None:
        super().__init__()
        self.optim, self.step = nn.Linear(WIDTH, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.optim(x).relu())


def test_names_of_submodules_do_not_matter(tmp_path: Path) -> None:
    run = fit([Named(), dense(8, 8)], tmp_path / "run", epochs=20)
    assert (run.predict(rows()[0]) == rows()[1]).mean() > 0.8


NET = f"""
from torch import nn
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear({WIDTH}, {8})
    def forward(self, x):
        return self.fc(x).relu()
def build():
    return [Layer(), nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
"""
CHANGES = {
    "a renamed layer": ("self.fc", "self.lin"),
    "another width": ("nn.Linear(8, 8)", "nn.Linear(8, 9)"),
    "another activation": (".relu()", ".tanh()"),
    "another activation module": ("nn.ReLU()", "nn.Tanh()"),
    "an added norm": ("nn.Linear(8, 8), nn.ReLU()", "nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()"),
    "no bias": (f"nn.Linear({WIDTH}, 8)", f"nn.Linear({WIDTH}, 8, bias=False)"),
    "a cell fewer": (", nn.Sequential(nn.Linear(8, 8), nn.ReLU())", ""),
    "a cell more": ("nn.ReLU())]", "nn.ReLU()), nn.Linear(8, 8)]"),
    "scaled output": ("self.fc(x)", "(2 * self.fc(x))"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a net, data, a finished run and one that was stopped."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "net.py").write_text(NET)
    x, y = rows()
    np.savez(folder / "rows.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    asked = {"run_dir": folder / "run", **FAST}
    edgetrain.fit(f"{folder / 'net.py'}:build", str(folder / "rows.npz"), **asked)
    with mock.patch.object(Stop, "asked", stopping_after(5)), pytest.raises(Stopped):
        edgetrain.fit(f"{folder / 'net.py'}:build", str(folder / "rows.npz"), **{**asked, "run_dir": folder / "part"})
    return folder


@pytest.mark.parametrize("kind", list(CHANGES))
def test_another_net_than_the_runs_is_refused(kind: str, saved: Path, tmp_path: Path) -> None:
    old, new = CHANGES[kind]
    assert old in NET
    (tmp_path / "net.py").write_text(NET.replace(old, new))
    net = f"{tmp_path / 'net.py'}:build"
    before = {path: path.read_bytes() for path in (saved / "part").rglob("*") if path.is_file()}
    with pytest.raises(InputError):
        edgetrain.open_run(saved / "run", net).evaluate()
    with pytest.raises(InputError):
        edgetrain.fit(net, str(saved / "rows.npz"), run_dir=saved / "part", resume=True, **FAST)
    assert before == {path: path.read_bytes() for path in (saved / "part").rglob("*") if path.is_file()}


def test_the_same_net_elsewhere_is_taken(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("# the same layers in another file\n" + NET)
    net = f"{tmp_path / 'other.py'}:build"
    whole = edgetrain.open_run(saved / "run", net)
    assert whole.evaluate().accuracy["sum"] == whole.record.test_accuracy
    resumed = edgetrain.fit(net, str(saved / "rows.npz"), run_dir=saved / "part", resume=True, **FAST)
    assert same(values(resumed.cells()), values(whole.cells()))


def with_output() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, CLASSES)
    )


@pytest.mark.parametrize("method", ["bp", "bp-checkpoint", "bp-offload"])
def test_backpropagation_trains_a_users_output_layer_as_plain_pytorch_does(method: str, tmp_path: Path) -> None:
    net = with_output()
    run = fit(net, tmp_path / "run", method, optimizer="sgd", epochs=1, batch_size=ROWS)
    x, y = (torch.from_numpy(value) for value in rows())
    x = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    plain = with_output()
    functional.cross_entropy(plain(x.float()), y).backward()
    with torch.no_grad():
        for value in plain.parameters():
            value -= FAST["lr"] * value.grad
    trained = run.model().eval()
    assert torch.allclose(trained(torch.from_numpy(rows()[0])), plain.eval()(x.float()), atol=1e-5)
    assert edgetrain.open_run(run.path, net).evaluate(rows()).accuracy == run.evaluate(rows()).accuracy


@pytest.mark.parametrize("method", ["mf", "ff", "predsim", "slp", "dfa"])
def test_activations_belong_to_their_layer_and_the_cells_are_listed(method: str, tmp_path: Path) -> None:
    class Notes(Callback):
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    notes = Notes()
    run = fit(with_output(), tmp_path / "run", method, epochs=1, callback=notes)
    assert "cells: 1 Linear, BatchNorm1d, ReLU; 2 Linear, Tanh" in notes.said
    kept = "is trained" if method == "dfa" else f"is left out: {method} trains none"
    assert f"the output layer, Linear, {kept}" in notes.said
    if method in ("mf", "ff", "predsim"):
        assert len(run.cells()) == 2
    assert len(run.predict(rows()[0])) == ROWS
