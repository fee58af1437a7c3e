"""VGG-like nets. ``pytest tests/nets/test_vgg.py``."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetrain.errors import InputError
from edgetrain.nets.spec import open_net
from edgetrain.nets.vgg import FAMILIES

CIFAR = (3, 32, 32)


def convolutions(*channels: int) -> int:
    """Learned numbers of a chain of 3x3 convolutions with bias."""
    return sum(before * after * 9 + after for before, after in pairwise(channels))


def total(spec: str, shape: tuple[int, ...] = CIFAR) -> int:
    return sum(cell.parameters() for cell in open_net(spec, shape, {}).cells)


def test_the_nets_have_the_shapes_of_their_papers() -> None:
    found = {family: [cell.out_shape for cell in open_net(family, CIFAR, {}).cells] for family in FAMILIES}
    assert found["vgg8b"] == [
        (128, 32, 32), (256, 16, 16), (256, 16, 16), (512, 8, 8), (512, 4, 4), (512, 2, 2), (1024,)]  # fmt: skip
    assert found["vgg11b"] == [
        (128, 32, 32), (128, 32, 32), (128, 32, 32), (256, 16, 16), (256, 16, 16), (512, 8, 8), (512, 8, 8),
        (512, 4, 4), (512, 2, 2), (1024,)]  # fmt: skip
    assert found["vgg11"] == [
        (64, 16, 16), (128, 8, 8), (256, 8, 8), (256, 4, 4), (512, 2, 2), (512, 2, 2), (1024, 2, 2)]  # fmt: skip


def test_the_nets_have_the_parameters_that_arithmetic_says() -> None:
    dense = 2048 * 1024 + 1024
    assert total("vgg8b") == convolutions(3, 128, 256, 256, 512, 512, 512) + dense == 8_886_784
    assert total("vgg11b") == convolutions(3, 128, 128, 128, 256, 256, 512, 512, 512, 512) + dense
    assert total("vgg11") == convolutions(3, 64, 128, 256, 256, 512, 512, 1024)


@pytest.mark.parametrize(("spec", "millions"), [("vgg8b", 8.9), ("vgg11b", 11.6), ("vgg11b:2", 42), ("vgg11b:3", 91)])
def test_the_sizes_are_those_that_the_first_paper_states(spec: str, millions: float) -> None:
    assert (total(spec) + 1024 * 10 + 10) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_multiplier_is_for_the_channels_of_the_convolutions() -> None:
    cells = open_net("vgg8b:0.25", CIFAR, {}).cells
    assert [cell.out_shape[0] for cell in cells] == [32, 64, 64, 128, 128, 128, 1024]
    assert [cell.out_shape[0] for cell in open_net("vgg11:0.001", CIFAR, {}).cells] == [1] * 7
    assert open_net("vgg8b:1", CIFAR, {}).cells[3].signature == open_net("vgg8b", CIFAR, {}).cells[3].signature


def test_cells_of_equal_cost_have_equal_signatures() -> None:
    signatures = [cell.signature for cell in open_net("vgg11b", CIFAR, {}).cells]
    assert signatures[1] == signatures[2]
    assert len(set(signatures)) == len(signatures) - 1


def test_only_the_convolutions_before_a_pooling_pool() -> None:
    cells = open_net("vgg8b:0.05;pool=avg", CIFAR, {}).cells
    pooled = [any(isinstance(part, nn.AvgPool2d) for part in cell.skeleton().modules()) for cell in cells]
    assert pooled == [False, True, False, True, True, True, False]
    assert [cell.body_shape is not None for cell in cells] == pooled


@pytest.mark.parametrize(
    ("shape", "option", "sides"),
    [
        ((1, 8, 8), "floor", [8, 4, 4, 2, 1, 1]),
        ((1, 28, 28), "floor", [28, 14, 14, 7, 3, 1]),
        ((1, 28, 28), "pad", [28, 14, 14, 7, 4, 2]),
        ((1, 7, 7), "pad", [7, 4, 4, 2, 1, 1]),
        ((1, 1, 1), "pad", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_poolings_that_would_leave_nothing_are_left_out(shape: tuple[int, ...], option: str, sides: list[int]) -> None:
    net = open_net(f"vgg8b:0.05;odd={option}", shape, {})
    assert [cell.out_shape[1:] for cell in net.cells[:-1]] == [(side, side) for side in sides]
    x = torch.rand(2, *shape)
    for index, cell in enumerate(net.cells):
        x = cell.materialise(0, index)(x)
        assert tuple(x.shape[1:]) == cell.out_shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(factor=st.decimals("0.001", "9", places=3), family=st.sampled_from(FAMILIES))
def test_any_positive_multiplier_reads_back(factor: object, family: str) -> None:
    cells = open_net(f"{family}:{factor}", (1, 8, 8), {}).cells
    first = open_net(family, (1, 8, 8), {}).cells[0].out_shape[0]
    assert cells[0].out_shape[0] == max(1, round(first * float(str(factor))))


@pytest.mark.parametrize("text", ["0", "0.0", "-1", "x", "1e3", ".5", "1,2", "nan", "inf", " 1", "٣"])
def test_a_multiplier_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="expected a positive number after the colon, such as vgg8b:0.5"):
        open_net(f"vgg8b:{text}", CIFAR, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_it_needs_images(family: str) -> None:
    with pytest.raises(InputError, match=f"'{family}' needs images"):
        open_net(family, (64,), {})
