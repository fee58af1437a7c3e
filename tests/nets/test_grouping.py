"""Which modules of a user's net form a cell. ``pytest tests/nets/test_grouping.py``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgetrain.nets.base import Net
from edgetrain.nets.grouping import grouped, is_layer
from edgetrain.nets.spec import open_net

CLASSES = 5


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


LETTERS = {
    "L": lambda: nn.Linear(4, 4),
    "C": lambda: nn.Conv2d(2, 2, 1),
    "R": lambda: Residual(4),
    "a": nn.ReLU,
    "g": nn.PReLU,
    "s": Swish,
    "n": lambda: nn.BatchNorm1d(4),
    "l": lambda: nn.LayerNorm(4),
    "p": lambda: nn.MaxPool2d(2),
    "d": nn.Dropout,
    "q": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()),
    "f": nn.Flatten,
}
CASES = {
    "La": "La",
    "LaLa": "La La",
    "anLndLap": "anLnd Lap",
    "CnapCaffL": "Cnap Ca ffL",
    "Caf": "Caf",
    "Cfa": "Cfa",
    "CfdLa": "C fdLa",
    "LqLsg": "Lq Lsg",
    "RaR": "Ra R",
    "aspd": "aspd",
    "": "",
    "LLL": "L L L",
}


def letters(text: str) -> str:
    made = [(letter, LETTERS[letter]()) for letter in text]
    named = {id(module): letter for letter, module in made}
    return " ".join("".join(named[id(module)] for module in group) for group in grouped(module for _, module in made))


@pytest.mark.parametrize(("modules", "cells"), CASES.items())
def test_modules_join_the_layer_they_belong_to(modules: str, cells: str) -> None:
    assert letters(modules) == cells


@given(st.text("LCRagnlpdsqf", max_size=12))
def test_every_module_is_in_one_cell_in_its_order_and_every_cell_has_one_layer(modules: str) -> None:
    cells = letters(modules).split()
    assert "".join(cells) == modules
    layers = [sum(letter.isupper() for letter in cell) for cell in cells]
    assert layers == ([1] * sum(layers) if any(layers) else [0] * len(layers))
    for cell, following in zip(cells, cells[1:], strict=False):  # only a reshaping begins a later cell before its layer
        assert following[0].isupper() or following[0] == "f"
        assert cell


@pytest.mark.parametrize("letter", LETTERS)
def test_layers_are_told_from_what_belongs_to_them(letter: str) -> None:
    assert is_layer(LETTERS[letter]()) == letter.isupper()


def opened(*modules: nn.Module, shape: tuple[int, ...] = (6,), generated: bool = False) -> Net:
    def build() -> Iterator[nn.Module]:
        yield from modules

    return open_net(build if generated else list(modules), shape, {}, classes=CLASSES)


def made_of(net: Net) -> list[str]:
    return [recipe.made_of for recipe in net.cells]


@pytest.mark.parametrize("generated", [False, True])
def test_a_final_linear_to_the_classes_is_the_output_layer(generated: bool) -> None:
    net = opened(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES), nn.LogSoftmax(1), generated=generated)
    assert made_of(net) == ["Linear, ReLU, Dropout"]
    assert net.output is not None
    assert net.output.in_shape == (8,)
    assert net.output.made_of == "Linear"
    cell = net.cells[0].materialise(0, 0)
    assert [type(part).__name__ for part in cell] == ["Linear", "ReLU", "Dropout"]


@pytest.mark.parametrize("generated", [False, True])
def test_an_output_layer_inside_a_final_sequential_is_found(generated: bool) -> None:
    head = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, CLASSES)), nn.Softmax(1))
    net = opened(nn.Linear(6, 8), nn.ReLU(), head, generated=generated)
    assert made_of(net) == ["Linear, ReLU", "Sequential"]
    assert net.output is not None
    inner = net.cells[1].materialise(0, 1)
    assert [type(part).__name__ for part in inner.modules()][1:] == ["Dropout", "Sequential", "Linear", "Tanh"]
    assert len(head) == 3  # the user's own module is as it was
    assert torch.equal(net.output.materialise(0, 0).weight, head[1][2].weight)


@pytest.mark.parametrize(
    "last",
    {
        "other width": nn.Linear(8, CLASSES + 1),
        "an activation after it": nn.Sequential(nn.Linear(8, CLASSES), nn.ReLU()),
        "a module of its own": nn.Sequential(OrderedDict(only=Residual(8))),
    }.values(),
)
def test_other_last_modules_are_cells(last: nn.Module) -> None:
    net = opened(nn.Linear(6, 8), nn.ReLU(), last)
    assert net.output is None
    assert len(net.cells) == 2


def test_a_linear_on_the_last_axis_of_a_sequence_is_no_output_layer() -> None:
    net = opened(nn.Linear(4, 8), nn.Linear(8, CLASSES), shape=(3, 4))
    assert (net.output, len(net.cells)) == (None, 2)


def test_a_net_that_is_only_an_output_layer_is_a_cell() -> None:
    net = opened(nn.Linear(6, CLASSES))
    assert (net.output, len(net.cells)) == (None, 1)


def test_a_lazy_output_layer_gets_its_shape() -> None:
    net = opened(nn.LazyConv2d(3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES), shape=(1, 6, 6))
    assert made_of(net) == ["Conv2d, ReLU, Flatten"]
    assert net.output is not None
    assert net.output.materialise(0, 0).weight.shape == (CLASSES, 48)
    assert net.output.in_shape == (48,)
