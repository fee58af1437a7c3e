"""What a trial finds out about a user's module. ``pytest tests/nets/test_trial.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from edgetrain.errors import InputError
from edgetrain.nets.base import CellRecipe
from edgetrain.nets.copying import cloned, named_tensors
from edgetrain.nets.spec import open_net
from edgetrain.nets.trial import try_module

WIDTH = 6


class Does(nn.Module):
    """A linear layer and whatever a test makes of its output."""

    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.change = nn.Linear(WIDTH, WIDTH), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x))


class SharedSlope(torch.autograd.Function):
    """The identity, whose gradient is the batch's mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].mean(0, keepdim=True).expand_as(gradients[0])


class RunningMean(nn.Module):
    """Keeps a mean of its batches that changes nothing."""

    def __init__(self, persistent: bool = True):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x)


def frozen_norm() -> nn.Module:
    norm = nn.BatchNorm1d(WIDTH).requires_grad_(False)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm.eval(), nn.ReLU())


def hooked(hook: Callable[[Tensor], Tensor]) -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    linear.weight.register_hook(hook)
    return linear


def cell(module: nn.Module) -> CellRecipe:
    return open_net([module], (WIDTH,), {}).cells[0]


COUPLED: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: Does(lambda z: z - z.mean(0)),
    "functional batch norm": lambda: Does(lambda z: functional.batch_norm(z, None, None, training=True)),
    "batch norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "norm of all": lambda: Does(lambda z: z / z.norm()),
    "softmax over samples": lambda: Does(lambda z: z.softmax(0)),
    "size of the batch": lambda: Does(lambda z: z / len(z)),
    "noise by neighbour": lambda: Does(lambda z: z + z.roll(1, 0)),
    "whole batches only": lambda: Does(lambda z: z.view(-1, 3 if len(z) % 3 == 0 else 4, WIDTH).flatten(0, 1)),
    "gradient alone": lambda: Does(SharedSlope.apply),
    "buffer alone": RunningMean,
    "clipping hook": lambda: hooked(lambda g: g.clamp(-0.1, 0.1)),
    "behind dropout": lambda: Does(lambda z: functional.dropout(z, 0.5) - z.mean(0)),
}
APART: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "layer norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)),
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4)),
    "functional dropout": lambda: Does(lambda z: functional.dropout(z, 0.4)),
    "noise": lambda: Does(lambda z: z + torch.randn_like(z)),
    "frozen batch norm": frozen_norm,
    "masking hook": lambda: hooked(lambda g: g * (torch.arange(WIDTH) > 2)),
    "softmax of each": lambda: Does(lambda z: z.softmax(1)),
}


@pytest.mark.parametrize("kind", list(COUPLED))
def test_batches_whose_samples_influence_each_other_cannot_be_split(kind: str) -> None:
    assert cell(COUPLED[kind]()).couples_batch


@pytest.mark.parametrize("kind", list(APART))
def test_batches_of_independent_samples_can_be_split(kind: str) -> None:
    assert not cell(APART[kind]()).couples_batch


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ListedParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = {"a": nn.Parameter(torch.ones(WIDTH))}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales["a"]


class Counting(nn.Module):
    def __init__(self, attribute: str = "steps"):
        super().__init__()
        self.linear, self.steps, self.seen, self.last = nn.Linear(WIDTH, WIDTH), 0, {"n": 0}, torch.zeros(WIDTH)
        self.attribute = attribute

    def forward(self, x: Tensor) -> Tensor:
        if self.attribute == "steps":
            self.steps += 1
        elif self.attribute == "seen":
            self.seen["n"] += 1
        else:
            self.last += x.detach()[0]
        return self.linear(x)


class SavesMore(nn.Module):
    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return x


def sharing_memory() -> nn.Module:
    both = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    both[1].weight = nn.Parameter(both[0].weight.detach().t())
    return both


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layers in a list": (Listed, "self.layers .* use nn.ModuleList"),
    "parameters in a dict": (ListedParameters, "nn.ParameterDict"),
    "a counter": (Counting, r"self.steps changes .*\(register_buffer"),
    "a counter in a dict": (lambda: Counting("seen"), "self.seen changes"),
    "a tensor attribute": (lambda: Counting("last"), "self.last changes"),
    "a buffer that is not saved": (lambda: RunningMean(persistent=False), "buffer mean changes .* persistent=True"),
    "extra state": (SavesMore, "get_extra_state"),
    "tensors that share memory": (sharing_memory, "share memory"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_state_that_would_be_lost_is_refused_by_name(kind: str) -> None:
    make, said = REFUSED[kind]
    with pytest.raises(InputError, match=said) as caught:
        cell(make())
    assert "meta" not in str(caught.value).lower()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.view(-1, 2, 3))[0].flatten(1)


def pruned() -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    prune.random_unstructured(linear, "weight", 0.5)
    linear(torch.ones(1, WIDTH))  # its weight is then a derived tensor
    return linear


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH), torch.full((WIDTH,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


TAKEN: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # with whether it needs values
    "item": (lambda: Does(lambda z: z * 2 if z.detach().sum().item() > 0 else z), True),
    "made in forward": (lambda: Does(lambda z: z * torch.arange(WIDTH)), False),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU()), False),
    "recurrent": (Recurrent, False),
    "pruned": (pruned, False),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), False),
    "constant": (Constant, False),
}


@pytest.mark.parametrize("kind", list(TAKEN))
def test_modules_that_run_are_taken_and_copied(kind: str) -> None:
    make, needs_values = TAKEN[kind]
    found = cell(make())
    assert found.needs_values is needs_values
    one, other = found.materialise(0, 0), found.materialise(0, 0)
    assert {name for name, _ in named_tensors(one)} == {name for name, _ in named_tensors(other)}
    x = torch.randn(5, WIDTH)
    assert torch.equal(one.eval()(x), other.eval()(x))
    with torch.no_grad():
        for _, value in named_tensors(one):
            value.mul_(0) if value.is_floating_point() else None
    assert torch.equal(other(x), found.materialise(0, 0).eval()(x))  # no copy shares values with another
    assert not torch.equal(one(x), other(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by torch.compile itself
def test_compiled_modules_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="compiled .* give the nn.Module itself"):
        cell(torch.compile(nn.Linear(WIDTH, 3)))


def test_a_module_that_changes_its_input_gets_a_copy() -> None:
    made = cell(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, 3))).materialise(0, 0)
    x = torch.randn(4, WIDTH)
    before = x.clone()
    made(x)
    assert torch.equal(x, before)


def test_copies_keep_ties_hooks_modes_and_frozen_weights() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3).eval())
    module[1].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    module[0].weight.register_hook(lambda g: g * 0)
    copy = cloned(module)
    assert copy[1].weight is copy[0].weight
    assert copy[0].weight is not module[0].weight
    assert not copy[0].bias.requires_grad
    assert not copy[2].training
    copy(torch.randn(4, 3)).sum().backward()
    assert float(copy[0].weight.grad.abs().sum()) == 0
    assert module[0].weight.grad is None


def test_a_dense_first_module_reads_images_flattened() -> None:
    found = open_net([nn.Linear(12, 5)], (1, 3, 4), {}).cells[0]
    assert found.materialise(0, 0)(torch.randn(7, 1, 3, 4)).shape == (7, 5)


def test_a_function_is_called_once_and_a_generator_again_for_each_cell() -> None:
    calls = []

    def listed() -> list[nn.Module]:
        calls.append("list")
        return [nn.Linear(WIDTH, 4), nn.Linear(4, 3)]

    net = open_net(listed, (WIDTH,), {}, seed=2)
    for index, recipe in enumerate(net.cells):
        recipe.materialise(2, index)
        recipe.skeleton()
    assert calls == ["list"]
    assert sum(recipe.kept_bytes for recipe in net.cells) == 4 * (WIDTH * 4 + 4 + 4 * 3 + 3)

    def generated() -> Any:
        calls.append("generator")
        yield from listed()

    made = open_net(generated, (WIDTH,), {}, seed=2)
    for index, recipe in enumerate(made.cells):
        same = net.cells[index].materialise(2, index).state_dict()
        assert all(torch.equal(value, same[name]) for name, value in recipe.materialise(2, index).state_dict().items())
    assert calls.count("generator") == 3


class Quiet(nn.Sequential):
    """A user's own class, which may draw at any time."""


@pytest.mark.parametrize(
    ("module", "draws"),
    [
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.ReLU()), False),
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.Dropout(0.1)), True),
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.RReLU()), True),
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.Dropout(0.0)), False),
        (Quiet(nn.Linear(WIDTH, 4)), True),
    ],
)
def test_modules_that_draw_are_known(module: nn.Module, draws: bool) -> None:
    assert try_module(module, torch.randn(6, WIDTH), "it").draws == draws
    module.register_forward_hook(lambda *_: None)
    assert try_module(module, torch.randn(6, WIDTH), "it").draws, "a hook is the user's own code"
