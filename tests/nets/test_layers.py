"""The parts that built-in cells share. ``pytest tests/nets/test_layers.py``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetrain.errors import InputError
from edgetrain.nets.layers import STANDARD, Layer, convolution, dense
from edgetrain.nets.spec import NETS, open_net

SPECS = {
    "mlp": "mlp:5,4",
    "cnn": "cnn:5,4",
    "lcmlp": "lcmlp:3,2",
    "vgg8b": "vgg8b:0.03",
    "vgg11b": "vgg11b:0.03",
    "vgg11": "vgg11:0.03",
    "vit": "vit:depth=2,width=4,heads=2,patch=4",
}


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_every_family_is_tested_here() -> None:
    assert list(SPECS) == list(NETS)


# --- Layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("options", ["dropout=0", "dropout=0.4;pool=avg", "odd=pad;act=leaky;prenorm=rms;norm=batch"])
def test_a_cell_is_its_parts_in_order_and_body_and_tail_are_its_two_halves(family: str, options: str) -> None:
    understood = NETS[family].options
    stated = [option for option in options.split(";") if option.partition("=")[0] in understood]
    for index, recipe in enumerate(open_net(";".join([SPECS[family], *stated]), (2, 12, 8), {}).cells):
        cell, x = recipe.materialise(0, index), rows(3, *recipe.in_shape)
        assert isinstance(cell, Layer)
        plain = nn.Sequential(*cell.children())
        for mode in (True, False):
            torch.manual_seed(5)
            expected = plain.train(mode)(x)
            torch.manual_seed(5)
            assert torch.equal(cell(x), expected)
            torch.manual_seed(5)
            body = cell.body(x)
            assert tuple(body.shape[1:]) == (recipe.body_shape or recipe.out_shape)
            assert torch.equal(cell.tail(body), expected)
            assert tuple(expected.shape[1:]) == recipe.out_shape


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        ("mlp:5", "pool=avg"),
        ("mlp:5", "embedding=9"),
        ("lcmlp:3", "odd=pad"),
        ("vit:depth=1,width=4,heads=2,patch=4", "act=leaky"),
        ("cnn:4", "tokens=mean"),
        ("vgg8b:0.03", "embedding=9"),
    ],
)
def test_an_option_that_a_family_would_ignore_is_refused(spec: str, option: str) -> None:
    with pytest.raises(InputError, match="no meaning"):
        open_net(f"{spec};{option}", (1, 8, 8), {})


def test_only_pooled_convolutions_have_a_body_of_another_shape() -> None:
    assert open_net("cnn:4", (1, 8, 6), {}).cells[0].body_shape == (4, 8, 6)
    assert [cell.body_shape for cell in open_net("vgg8b:0.03", (1, 8, 8), {}).cells[:2]] == [None, (8, 8, 8)]
    for family in ("mlp", "lcmlp", "vit"):
        assert all(cell.body_shape is None for cell in open_net(SPECS[family], (1, 8, 8), {}).cells)


def test_names_of_a_cells_state_are_those_of_its_parts() -> None:
    options = {**STANDARD, "norm": "batch", "prenorm": "layer", "dropout": "0.5"}
    layers = dense((2, 3), 4, options), convolution((2, 3, 3), 4, options)
    assert [[name for name, _ in layer.named_children()] for layer in layers] == [
        ["flatten", "prenorm", "linear", "norm", "act", "dropout"],
        ["prenorm", "conv", "norm", "act", "dropout", "pool"],
    ]
    assert "linear.weight" in layers[0].state_dict()
    assert "conv.weight" in layers[1].state_dict()


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in SPECS if family != "vit"])
def test_rms_scales_the_input_of_every_cell_but_the_first(family: str) -> None:
    net = open_net(f"{SPECS[family]};prenorm=rms", (2, 8, 8), {})
    modules = [cell.materialise(0, index) for index, cell in enumerate(net.cells)]
    assert ["prenorm" in dict(module.named_children()) for module in modules] == [False] + [True] * (len(modules) - 1)
    assert all(
        cell.parameters() == plain.parameters()
        for cell, plain in zip(net.cells, open_net(SPECS[family], (2, 8, 8), {}).cells, strict=True)
    )
    x = rows(3, *net.cells[1].in_shape)
    if "flatten" in dict(modules[1].named_children()):
        x = x.flatten(1)
    over = tuple(range(1, x.ndim))
    scaled = x / (x.square().mean(over, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(modules[1].get_submodule("prenorm")(x), scaled)


def test_first_and_later_cells_under_rms_have_different_signatures() -> None:
    cells = open_net("mlp:7x3;prenorm=rms", (7,), {}).cells
    assert cells[0].signature != cells[1].signature == cells[2].signature


def test_leaky_lets_a_hundredth_of_what_is_negative_pass() -> None:
    layer = dense((4,), 6, {**STANDARD, "act": "leaky"})
    x = rows(5, 4)
    before = layer.get_submodule("linear")(x)
    torch.testing.assert_close(layer(x), before.clamp(min=0) + 0.01 * before.clamp(max=0))


@pytest.mark.parametrize("family", SPECS)
def test_dropout_draws_and_nothing_else_does(family: str) -> None:
    for options, draws in (("dropout=0", False), ("dropout=0.0", False), ("dropout=.3", True)):
        cells = open_net(f"{SPECS[family]};{options}", (2, 8, 8), {}).cells
        assert all(cell.draws == draws for cell in cells)
        kinds = [type(part) for cell in cells for part in cell.skeleton().modules()]
        assert (nn.Dropout in kinds) == draws


@pytest.mark.parametrize("family", [family for family in SPECS if family != "vit"])
def test_batch_normalisation_couples_the_samples(family: str) -> None:
    assert all(cell.couples_batch for cell in open_net(f"{SPECS[family]};norm=batch", (2, 8, 8), {}).cells)
    assert not any(cell.couples_batch for cell in open_net(SPECS[family], (2, 8, 8), {}).cells)


def test_dropout_keeps_the_mean_and_leaves_evaluation_alone() -> None:
    layer = dense((4,), 5000, {**STANDARD, "dropout": "0.25"})
    x = rows(1, 4).abs()
    torch.manual_seed(0)
    kept, body = layer(x), layer.body(x)
    assert ((kept == 0) | torch.isclose(kept, body / 0.75)).all()
    share = (kept == 0)[body > 0].double().mean()
    assert abs(share - 0.25) < 0.03
    assert torch.equal(layer.eval()(x), body)


# --- odd sides --------------------------------------------------------------------------------


def test_odd_sides_are_padded_as_in_the_lbp_paper() -> None:
    cells = open_net("cnn:3,3,3,3,3;odd=pad", (1, 28, 28), {}).cells
    assert [cell.out_shape[1:] for cell in cells] == [(14, 14), (7, 7), (4, 4), (2, 2), (1, 1)]
    assert [cell.body_shape for cell in cells] == [(3, side, side) for side in (28, 14, 8, 4, 2)]
    assert [tuple(cell.skeleton().get_submodule("conv").weight.shape[2:]) for cell in cells] == [  # type: ignore[union-attr]
        (3, 3), (3, 3), (2, 2), (3, 3), (3, 3)]  # fmt: skip
    with pytest.raises(InputError, match="28x28 can be halved 5 times, not 6: use at most 5 cells"):
        open_net("cnn:3,3,3,3,3,3;odd=pad", (1, 28, 28), {})


def test_odd_sides_lose_a_row_otherwise() -> None:
    assert [cell.out_shape[1:] for cell in open_net("cnn:3,3,3,3", (1, 28, 28), {}).cells] == [
        (14, 14), (7, 7), (3, 3), (1, 1)]  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(height=st.integers(2, 40), width=st.integers(2, 40), odd=st.sampled_from(["floor", "pad"]))
def test_each_side_is_halved_for_itself(height: int, width: int, odd: str) -> None:
    cell = open_net(f"cnn:2;odd={odd}", (1, height, width), {}).cells[0]
    up = odd == "pad"
    assert cell.out_shape == (2, (height + up) // 2, (width + up) // 2)
    made = cell.materialise(0, 0)
    assert isinstance(made, Layer)
    x = torch.zeros(1, 1, height, width)
    assert tuple(made(x).shape[1:]) == cell.out_shape
    assert tuple(made.body(x).shape[1:]) == cell.body_shape
