"""Feedback alignment as the reference has it, against backpropagation by autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from reference import alignment, bp
from reference.drawn import labels, leaves, normal, stepped
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, max_pool2d
from torch.testing import assert_close

ROWS, CLASSES = 6, 3
Y = labels(ROWS, CLASSES)


def mlp(dtype=torch.float64, sizes=(5, 7, 6, CLASSES)):
    weights = [normal(n, d, key=n, dtype=dtype) for d, n in zip(sizes, sizes[1:], strict=False)]
    return weights, [normal(len(weight), key=90, dtype=dtype) for weight in weights]


def convolutional(pool, x):
    """Weights, biases, and the gradients of backpropagation, by autograd."""
    weights = [normal(4, 2, 3, 3, key=50), normal(3, 4, 3, 3, key=51), normal(5, 6, key=52), normal(3, 5, key=53)]
    biases = [normal(len(weight), key=54) for weight in weights]
    w, b = leaves(weights), leaves(biases)
    a, shrink = x, max_pool2d if pool == "max" else avg_pool2d
    for layer in (0, 1):
        a = shrink(conv2d(a, w[layer], b[layer], padding=1).relu(), 2)
    logits = (a.flatten(1) @ w[2].T + b[2]).relu() @ w[3].T + b[3]
    return weights, biases, torch.autograd.grad(cross_entropy(logits, Y), [*w, *b])


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_feedback_alignment_with_the_weights_themselves_is_backpropagation(pool):
    x = normal(ROWS, 2, 5, 8, key=55)  # 5 x 8 -> 2 x 4 -> 1 x 2
    weights, biases, expected = convolutional(pool, x)
    network = alignment.Network(weights, biases, weights, 1e-2, pool=pool)
    network.step(x, Y)
    learned = [*network.weights, *network.biases]
    assert_close([value.grad for value in learned], list(expected))
    assert_close(learned, stepped([*weights, *biases], expected, 1e-2))


def test_feedback_alignment_goes_back_through_its_own_weights():
    """One layer's B at a time differs from W: only the gradients of the layers below change."""
    weights, biases = mlp()
    x = normal(ROWS, 5, key=56)
    plain = alignment.Network(weights, biases, weights, 1e-2)
    plain.step(x, Y)
    for changed in (1, 2):
        fixed = [3 * w if layer == changed else w for layer, w in enumerate(weights)]
        other = alignment.Network(weights, biases, fixed[1:], 1e-2)  # the first B is not needed
        other.step(x, Y)
        for layer in range(3):
            assert_close(other.weights[layer].grad, plain.weights[layer].grad * (3 if layer < changed else 1))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alignment_of_one_hidden_layer_with_its_weights_trains_as_backpropagation(dtype, direct):
    weights, biases = mlp(dtype, (5, 7, CLASSES))
    x = normal(ROWS, 5, key=57, dtype=dtype)
    network = alignment.Network(weights, biases, weights[1:], 1e-2, direct)
    network.feedback[-1] = network.weights[-1]  # and stays so while they learn
    reference = bp.Network(weights, biases, 1e-2)
    alignment.train(network, x, Y, 3, 3, 4)
    bp.train(reference, x, Y, 3, 3, 4)
    assert not torch.allclose(network.weights[0], weights[0])
    assert_close(network.weights, [layer.weight.detach() for layer in reference.layers])
    assert_close(network.biases, [layer.bias.detach() for layer in reference.layers])


def test_direct_feedback_alignment_by_surrogates():
    """With dz = (e B) phi'(z), gradients are those of <phi(z), e B>, all below and above held still."""
    weights, biases = mlp()
    x = normal(ROWS, 5, key=58)
    fixed = [normal(CLASSES, 7, key=59), normal(CLASSES, 6, key=60)]
    network = alignment.Network(weights, biases, fixed, 1e-2, direct=True)
    logits = network.step(x, Y)
    error = (logits.softmax(1) - torch.eye(CLASSES, dtype=x.dtype)[Y]) / ROWS
    a = x
    for layer in (0, 1):
        w, b = leaves([weights[layer], biases[layer]])
        made = (a @ w.T + b).relu()
        expected = torch.autograd.grad((made * (error @ fixed[layer])).sum(), [w, b])
        assert_close([network.weights[layer].grad, network.biases[layer].grad], list(expected))
        a = made.detach()
    assert_close(network.weights[2].grad, error.T @ a)
