"""Convolutional autoencoders and GAN cells as the references have them, against loops, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from reference import cae, gan
from reference.drawn import labels, leaves, noise, normal, stepped
from torch.nn.functional import pad
from torch.testing import assert_close

ROWS, CLASSES = 6, 3
LR = {"lr": 1e-2, "weight_decay": 3e-2}


def cae_values(channels, units, height, width, key=1, dtype=torch.float64):
    (high, high_back), (wide, wide_back) = cae.kernels(height), cae.kernels(width)
    shapes = [(units, channels, high, wide), (units,), (units, channels, high_back, wide_back), (channels,)]
    return [normal(*shape, key=key + place, dtype=dtype) for place, shape in enumerate(shapes)]


def normalised(x):
    centred = x - x.sum() / x.numel()
    return centred / ((centred * centred).sum() / x.numel() + 1e-5) ** 0.5


def encoded(x, w, b, prenorm):
    """One sample [d, H, W], value by value: the maximum of each window of the rectified convolution."""
    x = pad(normalised(x) if prenorm else x, (1, 1, 1, 1))
    units, _, high, wide = w.shape
    rows, columns = x.shape[1] - high + 1, x.shape[2] - wide + 1
    found = []
    for unit in range(units):
        for i in range(0, rows - rows % 2, 2):
            for j in range(0, columns - columns % 2, 2):
                window = [
                    (x[:, r : r + high, s : s + wide] * w[unit]).sum() + b[unit] for r in (i, i + 1) for s in (j, j + 1)
                ]
                found.append(torch.stack(window).max().clamp(min=0))
    return torch.stack(found).view(units, rows // 2, columns // 2)


def decoded(z, v, c, height, width):
    """One sample: every latent value lays its kernel down."""
    _, channels, high, wide = v.shape
    made = c[:, None, None] + torch.zeros(channels, height, width, dtype=z.dtype)
    down, right = (1 if height % 2 else 2), (1 if width % 2 else 2)
    for unit in range(len(v)):
        for i in range(z.shape[1]):
            for j in range(z.shape[2]):
                left = j * right
                room = (left, width - left - wide, i * down, height - i * down - high)
                made = made + pad(z[unit, i, j] * v[unit], room)
    return made.clamp(min=0)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 5), (4, 3), (3, 2), (1, 1), (2, 1)])
def test_cae_has_the_gradient_of_its_formula(height, width, prenorm):
    values = cae_values(2, 3, height, width)
    x = normal(2, 2, height, width, key=9).abs()
    cell = cae.Cell(values, **LR, prenorm=prenorm)
    handed_on = cell.step(x)
    w, b, v, c = leaves(values)
    total = 0
    for row, latents in zip(x, handed_on, strict=True):
        z = encoded(row, w, b, prenorm)
        assert_close(latents, z.detach())
        total = total + (decoded(z, v, c, height, width) - row).square().mean()
    expected = torch.autograd.grad(total / len(x), [w, b, v, c])
    learned = [cell.w, cell.b, cell.v, cell.c]
    assert_close([value.grad for value in learned], list(expected))
    assert_close([value.detach() for value in learned], stepped(values, expected, 1e-2, 3e-2))


def test_cae_shapes_of_mnist():
    """28-14-7-4-2-1, and each decoder gives back what its encoder read."""
    x = normal(2, 1, 28, 28).abs()
    sides = [28]
    for units in (2, 3, 4, 5, 6, 7):
        cell = cae.Cell(cae_values(x.shape[1], units, *x.shape[2:]), **LR)
        z = cell.step(x)
        assert cell.decode(z, *x.shape[2:]).shape == x.shape
        sides.append(z.shape[2])
        x = z
    assert sides == [28, 14, 7, 4, 2, 1, 1]
    assert [cae.kernels(side) for side in (28, 7, 4, 1)] == [(3, 2), (2, 4), (3, 2), (2, 1)]


def gan_values(inputs, units, key=1, dtype=torch.float64):
    generator = [(units, inputs), (units,), (inputs, units), (inputs,)]
    discriminator = [(units, inputs), (units,), (1, units), (1,)]
    drawn = partial(normal, dtype=dtype)
    return tuple(
        [drawn(*shape, key=key + 10 * half + place) for place, shape in enumerate(shapes)]
        for half, shapes in enumerate((generator, discriminator))
    )


def judged(row, parts):
    u, bias, w, s = parts
    return sum((row @ u[unit] + bias[unit]).clamp(min=0) * w[0, unit] for unit in range(len(u))) + s[0]


def generated(row, parts):
    w, b, v, c = parts
    return ((normalised(row) @ w.T + b).clamp(min=0) @ v.T + c).clamp(min=0)


def test_gan_has_the_gradients_of_its_formulas():
    generator, discriminator = gan_values(6, 4)
    cell = gan.Cell(3, generator, discriminator, **LR, noise=noise)
    x = normal(ROWS, 2, 3, key=30).abs()
    before = cell.encode(x).detach()
    handed_on = cell.step(x, 1, 2)
    nu = noise(3, 1, 2, x).flatten(1)

    parts, total = leaves(discriminator), 0
    for row, draw in zip(x.flatten(1), nu, strict=True):
        real, fake = judged(row, parts), judged(generated(draw, generator), parts)
        total = total - torch.log(1 / (1 + torch.exp(-real))) - torch.log(1 - 1 / (1 + torch.exp(-fake)))
    expected = torch.autograd.grad(total / ROWS, parts)
    assert_close([value.grad for value in cell.discriminator], list(expected))

    renewed = [value.detach() for value in cell.discriminator]
    assert_close(renewed, stepped(discriminator, expected, 1e-2, 3e-2))
    parts = leaves(generator)
    total = sum(-torch.log(1 / (1 + torch.exp(-judged(generated(draw, parts), renewed)))) for draw in nu)
    expected = torch.autograd.grad(total / ROWS, parts)
    assert_close([value.grad for value in cell.generator], list(expected))
    assert_close([value.detach() for value in cell.generator], stepped(generator, expected, 1e-2, 3e-2))
    assert_close(handed_on, before, rtol=0, atol=0)
    w, b = generator[:2]
    for row, latents in zip(x.flatten(1), handed_on, strict=True):
        assert_close(latents, (normalised(row) @ w.T + b).clamp(min=0))


def trained(twin, schedule, dtype):
    """The first tensor of each cell, and the classifier's weights."""
    if twin is cae:
        sizes = [(2, 3, 5, 4), (3, 2, 3, 2)]
        cells = [cae.Cell(cae_values(*size, dtype=dtype), **LR) for size in sizes]
        x, features = normal(ROWS, 2, 5, 4, key=40, dtype=dtype).abs(), 3 * 3 * 2 + 2 * 2 * 1
    else:
        cells = [
            gan.Cell(index, *gan_values(*sizes, dtype=dtype), **LR, noise=noise)
            for index, sizes in enumerate([(6, 4), (4, 3)])
        ]
        x, features = normal(ROWS, 2, 3, key=40, dtype=dtype).abs(), 4 + 3
    classifier = twin.Classifier(
        normal(CLASSES, features, key=41, dtype=dtype), normal(CLASSES, key=42, dtype=dtype), **LR
    )
    getattr(twin, schedule)(cells, classifier, x, labels(ROWS, CLASSES), 3, 2, 4)
    first = [cell.w if twin is cae else cell.generator[0] for cell in cells]
    return [value.detach() for value in (*first, classifier.layer.weight)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("twin", [cae, gan])
def test_schedules(twin, dtype):
    sequence, separate = (trained(twin, schedule, dtype) for schedule in ("sequence", "separate"))
    assert {value.dtype for value in sequence + separate} == {dtype}
    assert torch.equal(sequence[0], separate[0])
    for one, other in zip(sequence[1:], separate[1:], strict=True):
        assert not torch.equal(one, other)
