"""Locally connected layers. ``pytest tests/nets/test_lcmlp.py``."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d, pad

from edgetrain.errors import InputError
from edgetrain.nets.lcmlp import LocallyConnected
from edgetrain.nets.spec import open_net

DOUBLE = torch.float64


def naive(layer: LocallyConnected, x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, channels, H, W], pixel by pixel and weight by weight."""
    before, (_, channels, height, width) = (layer.patch - 1) // 2, x.shape
    out = torch.zeros(len(x), layer.weight.shape[2], height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            for unit in range(out.shape[1]):
                weights = layer.weight[i * width + j, :, unit].reshape(channels, layer.patch, layer.patch)
                for c, di, dj in product(*map(range, weights.shape)):
                    row, column = i + di - before, j + dj - before
                    if 0 <= row < height and 0 <= column < width:
                        out[:, unit, i, j] += weights[c, di, dj] * x[:, c, row, column]
    return out if layer.bias is None else out + layer.bias


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_every_pixel_has_its_own_weights_for_its_patch(patch: int, bias: bool) -> None:
    torch.manual_seed(patch)
    layer = LocallyConnected((2, 4, 5), 3, patch, bias).double()
    x = torch.randn(3, 2, 4, 5, dtype=DOUBLE, requires_grad=True)
    pull = torch.randn(3, 3, 4, 5, dtype=DOUBLE)
    wanted = [x, *layer.parameters()]
    expected, found = naive(layer, x), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * pull).sum(), wanted),
        torch.autograd.grad((expected * pull).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("patch", [3, 4])
def test_with_the_same_weights_at_every_pixel_it_is_a_convolution(patch: int) -> None:
    layer = LocallyConnected((2, 6, 6), 3, patch).double()
    kernel, bias = torch.randn(3, 2, patch, patch, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    with torch.no_grad():
        layer.weight.copy_(kernel.flatten(1).T.expand(36, -1, -1))
        assert layer.bias is not None
        layer.bias.copy_(bias[:, None, None].expand(3, 6, 6))
    x = torch.randn(2, 2, 6, 6, dtype=DOUBLE)
    before, after = (patch - 1) // 2, patch // 2
    torch.testing.assert_close(layer(x), conv2d(pad(x, (before, after, before, after)), kernel, bias))


def test_first_weights_are_within_the_bound_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer, bound = LocallyConnected((3, 9, 9), 3, 4), (3 * 4 * 4) ** -0.5
    for parameter in layer.parameters():
        assert bound * 0.95 < parameter.abs().max() <= bound
        assert abs(parameter.mean()) < bound / 10


def test_the_papers_net_has_the_parameters_that_arithmetic_says() -> None:
    net = open_net("lcmlp:4,8,16", (3, 32, 32), {"bias": "0"})
    assert [cell.parameters() for cell in net.cells] == [1024 * 3 * k * k * 3 for k in (4, 8, 16)]
    assert [cell.out_shape for cell in net.cells] == [(3, 32, 32)] * 3
    biased = open_net("lcmlp:4;bias=1", (3, 32, 32), {"bias": "0"}).cells[0]
    assert biased.parameters() == 1024 * 48 * 3 + 3072


def test_parts_stand_in_order_and_patches_may_repeat() -> None:
    net = open_net("lcmlp:3x2;norm=batch;prenorm=layer;dropout=0.1", (1, 4, 4), {})
    assert [name for name, _ in net.cells[1].skeleton().named_children()] == [
        "prenorm", "local", "norm", "act", "dropout"]  # fmt: skip
    assert len(net.cells) == 2
    assert net.cells[0].signature == net.cells[1].signature
    assert net.cells[0].signature != open_net("lcmlp:2", (1, 4, 4), net.options).cells[0].signature


def test_it_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        layer = nn.Sequential(LocallyConnected((3, 8, 9), 3, 4))
        out = layer(torch.empty(5, 3, 8, 9))
        out.sum().backward()
    assert tuple(out.shape) == (5, 3, 8, 9)


@pytest.mark.parametrize("text", ["", "0", "4,", "4,,8", "-4", "4x0", "four"])
def test_patches_that_are_none_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="expected lcmlp:4,8,16"):
        open_net(f"lcmlp:{text}", (1, 8, 8), {})


def test_patches_larger_than_twice_the_image_are_refused() -> None:
    assert len(open_net("lcmlp:16", (1, 8, 9), {}).cells) == 1
    with pytest.raises(InputError, match="patches of 17 on images of 8x9; expected at most 16"):
        open_net("lcmlp:4,17", (1, 8, 9), {})


def test_it_needs_images() -> None:
    with pytest.raises(InputError, match="'lcmlp:4' needs images"):
        open_net("lcmlp:4", (64,), {})
