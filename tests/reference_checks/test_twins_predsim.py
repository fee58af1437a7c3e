"""Similarity matching as the reference has it, against the formulas by other means, in float64."""

from __future__ import annotations

import pytest
import torch
from reference import predsim
from reference.drawn import labels, leaves, normal, stepped
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import conv2d, max_pool2d
from torch.testing import assert_close

ROWS, CLASSES = 6, 3
Y = labels(ROWS, CLASSES)


def test_similarity_by_pairs_is_the_matrix():
    rows = normal(ROWS, 5, key=1)
    rows[3] = 0.25  # a constant row is like nothing, and harms nobody's gradient
    rows[4] = -2 * rows[0] + 7
    one, other = leaves([rows, rows])
    found = predsim.similarity(one)
    assert_close(found, predsim.similarity_by_pairs(other))
    weights = normal(ROWS, ROWS, key=2)
    (found * weights).sum().backward()
    (predsim.similarity_by_pairs(other) * weights).sum().backward()
    assert one.grad.isfinite().all()
    assert_close(one.grad, other.grad)
    assert_close(found[3], torch.zeros(ROWS, dtype=torch.float64))
    assert_close(found[0, 4].detach(), torch.tensor(-1.0, dtype=torch.float64), rtol=0, atol=1e-7)
    assert found.abs().max() <= 1
    correlation = torch.corrcoef(rows[[0, 1, 2, 4]])
    assert_close(found[[0, 1, 2, 4]][:, [0, 1, 2, 4]].detach(), correlation, rtol=0, atol=1e-7)
    labels_alike = predsim.similarity(torch.eye(CLASSES, dtype=torch.float64)[Y])
    same = Y[:, None] == Y[None]
    assert_close(labels_alike, torch.where(same, 1.0, -1 / (CLASSES - 1)).double(), rtol=0, atol=1e-7)


def test_head_side():
    found = {size: predsim.head_side(*size) for size in [(128, 32, 32), (512, 8, 8), (512, 1, 1), (3, 4, 7)]}
    assert found == {(128, 32, 32): 4, (512, 8, 8): 2, (512, 1, 1): 1, (3, 4, 7): 4}
    assert predsim.head_side(4096, 3, 3) == 1


def predsim_parts(kind, key=3, dtype=torch.float64, inputs=2, units=4, side=3):
    """Weights, bias, head and mapping of a cell; of a convolution on maps of side x side."""
    if kind == "dense":
        shapes = [(units, inputs), (units,), (CLASSES, units), (CLASSES,), (5, units)]
    else:
        shapes = [(units, inputs, 3, 3), (units,), (CLASSES, units * side * side), (CLASSES,), (5, units, 3, 3)]
    weight, bias, head, head_bias, mapping = (
        normal(*shape, key=key + place, dtype=dtype) for place, shape in enumerate(shapes)
    )
    return weight, bias, (head, head_bias), mapping


def batch_norm(kind, units=4, dtype=torch.float64):
    norm = (nn.BatchNorm1d if kind == "dense" else nn.BatchNorm2d)(units, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + normal(units, key=20, dtype=dtype) / 2)
        norm.bias.copy_(normal(units, key=21, dtype=dtype))
    return norm


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("kind", "side"), [("dense", 0), ("conv", 3), ("conv", 1)])
def test_predsim_has_the_gradient_of_its_formula(kind, side, normalise):
    weight, bias, head, mapping = predsim_parts(kind, side=side)
    norm = batch_norm(kind) if normalise else None
    cell = predsim.Cell(weight, bias, norm, head, mapping, 1e-2, pool=side == 3)
    x = normal(ROWS, 2, key=30) if kind == "dense" else normal(ROWS, 2, side, side, key=31)
    handed_on = cell.step(x, Y)
    scale = [norm.weight.detach(), norm.bias.detach()] if normalise else []
    parts = leaves([weight, bias, *head, mapping, *scale])
    w, b, h, h_bias, m, *scale = parts
    z = x @ w.T + b if kind == "dense" else conv2d(x, w, padding=1) + b[:, None, None]
    if scale:
        over, shape = ((0,), (1, -1)) if kind == "dense" else ((0, 2, 3), (1, -1, 1, 1))
        mean = z.mean(over, keepdim=True)
        variance = (z - mean).square().mean(over, keepdim=True)
        z = (z - mean) / (variance + 1e-5).sqrt() * scale[0].view(shape) + scale[1].view(shape)
    a = torch.where(z > 0, z, 0.01 * z)
    mapped = a @ m.T if kind == "dense" else conv2d(a, m, padding=1).flatten(2)
    if side == 3:
        mapped = ((mapped - mapped.mean(2, keepdim=True)).square().sum(2) / (mapped.shape[2] - 1)).sqrt()
    found = predsim.similarity_by_pairs(mapped.flatten(1))
    truth = predsim.similarity_by_pairs(torch.eye(CLASSES, dtype=x.dtype)[Y])
    logits = a.flatten(1) @ h.T + h_bias  # 4 x 3 x 3 values fit the head unpooled
    prediction = -logits.log_softmax(1)[range(ROWS), Y].mean()
    loss = 0.01 * prediction + 0.99 * (found - truth).square().sum() / ROWS**2
    expected = torch.autograd.grad(loss, parts)
    learned = [cell.weight, cell.bias, *cell.head, cell.mapping, *cell.norm.parameters()]
    assert_close([value.grad for value in learned], list(expected), rtol=1e-6, atol=1e-12)
    given = [value.detach() for value in parts]
    assert_close([value.detach() for value in learned], stepped(given, expected, 1e-2), rtol=1e-6, atol=1e-6)
    assert_close(handed_on, max_pool2d(a, 2).detach() if side == 3 else a.detach())
    assert norm is None or not norm.running_mean.any()  # what was given stays as it was


def test_predsim_is_differentiated_right():
    weight, bias, head, mapping = predsim_parts("conv")
    cell = predsim.Cell(weight, bias, None, head, mapping, 1e-2)
    a = normal(ROWS, 4, 3, 3, key=32).requires_grad_()
    assert gradcheck(lambda a: cell.loss(a, Y), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predsim_schedules(dtype):
    def trained(schedule, matrix):
        weight, bias, head, mapping = predsim_parts("conv", dtype=dtype)
        first = predsim.Cell(weight, bias, batch_norm("conv", dtype=dtype), head, mapping, 1e-2, True, matrix)
        weight, bias, head, mapping = predsim_parts("dense", dtype=dtype, inputs=4)
        second = predsim.Cell(weight, bias, None, head, mapping, 1e-2, matrix=matrix)
        schedule([first, second], normal(ROWS, 2, 3, 3, key=33, dtype=dtype), Y, 3, 2, 4)
        assert first.scores(normal(2, 2, 3, 3, dtype=dtype)).shape == (2, CLASSES)
        return [first.weight.detach(), second.weight.detach()]

    sequence, separate = (trained(do, predsim.similarity) for do in (predsim.sequence, predsim.separate))
    assert sequence[0].dtype == dtype
    assert torch.equal(sequence[0], separate[0])
    assert not torch.equal(sequence[1], separate[1])
    if dtype == torch.float64:
        assert_close(sequence, trained(predsim.sequence, predsim.similarity_by_pairs))


def test_predsim_hands_on_by_running_statistics_once_trained():
    """In separate, the second cell is the one that is trained on such latents alone."""

    def pair():
        weight, bias, head, mapping = predsim_parts("conv")
        first = predsim.Cell(weight, bias, batch_norm("conv"), head, mapping, 1e-2, pool=True)
        weight, bias, head, mapping = predsim_parts("dense", inputs=4)
        return first, predsim.Cell(weight, bias, None, head, mapping, 1e-2)

    x = normal(ROWS, 2, 3, 3, key=33)
    both, (first, second) = pair(), pair()
    predsim.separate(list(both), x, Y, 3, 2, 4)
    predsim.sequence([first], x, Y, 3, 2, 4)
    mean, variance = (v[:, None, None] for v in (first.norm.running_mean, first.norm.running_var))
    scale, shift = (v.detach()[:, None, None] for v in (first.norm.weight, first.norm.bias))
    z = conv2d(x, first.weight, first.bias, padding=1).detach()
    z = (z - mean) / (variance + 1e-5).sqrt() * scale + shift
    a = torch.where(z > 0, z, 0.01 * z)[:, :, :2, :2].amax((2, 3))  # the one window of 3 x 3 pixels
    predsim.sequence([second], a, Y, 3, 2, 4)
    assert_close(both[1].weight, second.weight)
