"""FF, SymBa and SLL as the references have them, against the formulas by other means, in float64."""

from __future__ import annotations

import pytest
import torch
from reference import ff, sll
from reference.drawn import labels, leaves, noise, normal, stepped
from torch.autograd import gradcheck
from torch.testing import assert_close

ROWS, INPUTS, UNITS, CLASSES = 6, 7, 5, 3
Y = labels(ROWS, CLASSES)


def wrong(epoch, samples, y):
    """A label that is not the right one, another in each epoch."""
    return (y + 1 + (samples + epoch) % (CLASSES - 1)) % CLASSES


def ff_cell(loss=ff.forward_forward, first=False, key=1):
    inputs = INPUTS if first else UNITS
    return ff.Cell(normal(UNITS, inputs, key=key), normal(UNITS, key=key + 50), 1e-2, first, loss)


def goodness_of(x, w, b, first):
    """Sample by sample and unit by unit."""
    found = []
    for row in x:
        seen = row if first else row / ((row @ row) / len(row) + 1e-8) ** 0.5
        units = [(seen @ w[unit] + b[unit]).clamp(min=0) for unit in range(len(w))]
        found.append(sum(a * a for a in units) / len(units))
    return found


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("loss", [ff.forward_forward, ff.symba])
def test_ff_has_the_gradient_of_its_formula(loss, first):
    cell = ff_cell(loss, first)
    right, bad = (normal(ROWS, cell.weight.shape[1], key=key) for key in (2, 3))
    w, b = leaves([cell.weight.detach(), cell.bias.detach()])
    total = 0
    for good, fake in zip(goodness_of(right, w, b, first), goodness_of(bad, w, b, first), strict=True):
        if loss is ff.symba:
            total = total + torch.log(1 + torch.exp(-4 * (good - fake)))
        else:
            total = total + (torch.log(1 + torch.exp(2 - good)) + torch.log(1 + torch.exp(fake - 2))) / 2
    expected = torch.autograd.grad(total / ROWS, [w, b])
    by_hand = cell.gradients_by_hand(right, bad)
    before = cell.activations(right).detach(), cell.activations(bad).detach()
    handed_on = cell.step(right, bad)
    assert_close(cell.weight.grad, expected[0])
    assert_close(cell.bias.grad, expected[1])
    assert_close(by_hand, tuple(expected))
    assert_close([cell.weight.detach(), cell.bias.detach()], stepped([w.detach(), b.detach()], expected, 1e-2))
    assert_close(handed_on, before, rtol=0, atol=0)


def test_labels_stand_in_the_first_inputs():
    x = normal(ROWS, 1, INPUTS, key=4)
    rows = ff.labelled(x, Y, CLASSES)
    for row, image, label in zip(rows, x, Y.tolist(), strict=True):
        assert row[:CLASSES].tolist() == [float(entry == label) for entry in range(CLASSES)]
        assert torch.equal(row[CLASSES:], image[0, CLASSES:])
    assert_close(ff.neutral(x, CLASSES)[:, :CLASSES], torch.full((ROWS, CLASSES), 1 / 3, dtype=torch.float64))


def test_ff_prediction_tries_every_label_and_sums_over_cells():
    cells = [ff_cell(first=True), ff_cell(key=9)]
    x = normal(ROWS, INPUTS, key=5)
    scores = ff.predict(cells, x, CLASSES)
    for row in range(ROWS):
        for label in range(CLASSES):
            a = x[row : row + 1].clone()
            a[0, :CLASSES] = torch.eye(CLASSES, dtype=a.dtype)[label]
            total = 0
            for cell in cells:
                total = total + goodness_of(a, cell.weight, cell.bias, cell.first)[0]
                a = cell.activations(a)
            assert_close(scores[row, label], total.detach())
    for features in ff.one_pass(cells, x, CLASSES):
        assert_close(features.square().mean(1), torch.ones(ROWS, dtype=torch.float64))


def trained_ff(schedule, loss, dtype, wrong_labels=wrong, **options):
    made = [ff_cell(loss, True), ff_cell(loss, key=9), ff_cell(loss, key=10)]
    cells = [ff.Cell(cell.weight.detach().to(dtype), None, 1e-2, cell.first, loss) for cell in made]
    schedule(cells, normal(ROWS, INPUTS, key=6, dtype=dtype), Y, 3, 2, 4, CLASSES, wrong_labels, **options)
    return [cell.weight.detach() for cell in cells]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [ff.forward_forward, ff.symba])
def test_ff_schedules(loss, dtype):
    sequence, separate = (trained_ff(schedule, loss, dtype) for schedule in (ff.sequence, ff.separate))
    assert sequence[0].dtype == dtype
    assert torch.equal(sequence[0], separate[0])
    assert not torch.equal(sequence[1], separate[1])
    steady = trained_ff(ff.separate, loss, dtype, lambda epoch, samples, y: wrong(0, samples, y))
    stored = trained_ff(ff.separate, loss, dtype, lambda epoch, samples, y: wrong(0, samples, y), stored=0)
    assert_close(steady, stored)  # one and the same where wrong labels never change
    assert not torch.allclose(separate[1], trained_ff(ff.separate, loss, dtype, stored=0)[1])


def sll_parts():
    values = [normal(UNITS, INPUTS, key=11), normal(UNITS, key=12), normal(UNITS, CLASSES, key=13)]
    return [*values, normal(INPUTS, CLASSES, key=14)]


def kept(cell, epoch, step, like):
    return (noise(cell, epoch, step, like) > -0.5).to(like.dtype)


@pytest.mark.parametrize("mask", [None, kept])
@pytest.mark.parametrize("by_hand", [False, True])
def test_sll_has_the_gradient_of_its_formula(by_hand, mask):
    x, p, beta = normal(ROWS, 1, INPUTS, key=15), 0.3 if mask else 0.0, 0.7
    weight, bias, r, r_parent = sll_parts()
    cell = sll.Cell(4, weight, bias, r, r_parent, 1e-3, beta, p, mask, by_hand)
    before = cell.activations(x).detach()
    handed_on = cell.step(x, Y, 1, 2)
    w, b = leaves([weight, bias])
    kept_r = r * mask(4, 1, 2, r) / 0.7 if mask else r
    total = 0
    for row, label in zip(x[:, 0], Y.tolist(), strict=True):
        v = (w @ row + b).clamp(min=0) @ kept_r
        q, parent = v.exp() / v.exp().sum(), (row @ r_parent).exp() / (row @ r_parent).exp().sum()
        total = total - q[label].log() - beta * sum((parent[c] * q[c]) ** 0.5 for c in range(CLASSES)).log()
    expected = torch.autograd.grad(total / ROWS, [w, b])
    assert_close(cell.weight.grad, expected[0])
    assert_close(cell.bias.grad, expected[1])
    assert_close([cell.weight.detach(), cell.bias.detach()], stepped([weight, bias], expected, 1e-3))
    assert_close(handed_on, before, rtol=0, atol=0)
    assert_close(cell.scores(x), cell.activations(x) @ r)


def test_sll_slope_by_hand_is_the_gradient_of_the_loss():
    v, parent = leaves([3 * normal(ROWS, CLASSES, key=16), normal(ROWS, CLASSES, key=17)])
    for beta in (0.0, 1.0, 2.5):
        (slope,) = torch.autograd.grad(sll.local_loss(v, parent, Y, beta), v)
        assert_close(sll.slope_by_hand(v, parent, Y, beta).detach(), slope)
        assert gradcheck(lambda v, beta=beta: sll.local_loss(v, parent.detach(), Y, beta), v)
    sll.local_loss(v, parent, Y, 1.0).backward()
    assert parent.grad is None  # nothing flows to the parent


@pytest.mark.parametrize("how", ["class", "mean"])
def test_sll_of_tokens(how):
    tokens, images = normal(ROWS, 4, UNITS, key=18), normal(ROWS, 1, INPUTS, key=19).unsqueeze(1)
    r, r_parent, r_image = (normal(n, CLASSES, key=n) for n in (UNITS, UNITS + 20, INPUTS))
    parent = normal(ROWS, 2, UNITS + 20, key=21)
    stands = tokens[:, 0] if how == "class" else sum(tokens[:, t] for t in range(4)) / 4
    above = parent[:, 0] if how == "class" else (parent[:, 0] + parent[:, 1]) / 2
    found = sll.token_loss(tokens, parent, Y, r, r_parent, how)
    assert_close(found, sll.local_loss(stands @ r, above @ r_parent, Y, 1.0))
    found = sll.token_loss(tokens, images, Y, r, r_image, how, 0.5)
    assert_close(found, sll.local_loss(stands @ r, images.flatten(1) @ r_image, Y, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_hand", [False, True])
def test_sll_schedules(by_hand, dtype):
    def trained(schedule, by_hand):
        weight, bias, r, r_parent = (value.to(dtype) for value in sll_parts())
        above = normal(UNITS, UNITS, key=22, dtype=dtype), bias, r, normal(UNITS, CLASSES, key=23, dtype=dtype)
        cells = [
            sll.Cell(index, *parts, 1e-2, 1.0, 0.3, kept, by_hand)
            for index, parts in enumerate([(weight, bias, r, r_parent), above])
        ]
        schedule(cells, normal(ROWS, 1, INPUTS, key=24, dtype=dtype), Y, 3, 2, 4)
        return [cell.weight.detach() for cell in cells]

    sequence, separate = (trained(schedule, by_hand) for schedule in (sll.sequence, sll.separate))
    assert sequence[0].dtype == dtype
    assert torch.equal(sequence[0], separate[0])
    assert not torch.equal(sequence[1], separate[1])
    assert_close(sequence, trained(sll.sequence, not by_hand))
