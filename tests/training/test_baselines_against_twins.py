"""Feedback alignment against its slow twin, thrifty backpropagation and the perceptron against the plain ones."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from machine import (
    ALMOST,
    BATCH,
    CLASSES,
    EPOCHS,
    EXACT,
    LR,
    PLACEMENTS,
    ROWS,
    SEED,
    UNEVEN,
    assert_close,
    assert_same,
    data,
    finished,
    first_weights,
    learned,
    shown,
    step_of,
    trained,
    units,
    work_of,
)
from reference import alignment
from reference.batches import shuffled
from torch import nn
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")


# -- feedback alignment --------------------------------------------------------------------------------

ALIGNED = {
    "dense": ("pixels", UNEVEN),
    "dense, no biases": ("images", f"{UNEVEN};bias=0"),
    "convolutional": ("images", "cnn:4,6"),
    "convolutional, average": ("odd images", "cnn:4,6;pool=avg"),
}


def twin_of(whole, head, direct, lr=LR):
    """The twin of a net, and its parameters by the names of a run's files."""
    parts = [getattr(part, "conv", None) or part.linear for part in whole]
    layers = [*parts, head["classifier"] if direct else head]
    if direct:
        feedback = [matrix.flatten(1) for matrix in head["feedback"].buffers()]
    else:
        feedback = [layer.feedback for layer in layers[1:]]
    weights = [layer.weight.detach() for layer in layers]
    biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]
    pooling = getattr(whole[0], "pool", None)
    twin = alignment.Network(
        weights, biases, feedback, lr, direct, "avg" if isinstance(pooling, nn.AvgPool2d) else "max"
    )
    names = [f"cell.{index}.{'conv' if part.weight.ndim == 4 else 'linear'}" for index, part in enumerate(parts)]
    names.append("head.classifier" if direct else "head")
    values = {f"{name}.weight": value for name, value in zip(names, twin.weights, strict=True)}
    values |= {f"{name}.bias": value for name, value in zip(names, twin.biases, strict=True) if value is not None}
    return twin, values


@cache
def alignment_reference(method, case):
    kind, net = ALIGNED[case]
    (whole,), (head,) = first_weights(method, kind, net=net)
    twin, values = twin_of(whole, head, method == "dfa")
    alignment.train(twin, data(kind).x, data(kind).y, SEED, EPOCHS, BATCH)
    return twin, learned("000", twin.optimizer, values)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", ALIGNED)
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_feedback_alignment_is_the_plain_loop(tmp_path, method, case, placement):
    """Nearly: the twin's error is softmax minus truth, the machine's comes from autograd's cross-entropy."""
    kind, net = ALIGNED[case]
    run = finished(tmp_path, method, kind, net=net, placement=placement)
    twin, expected = alignment_reference(method, case)
    assert_close(units(run.path), expected, **ALMOST)
    scores = torch.from_numpy(run.scores(data(kind).raw[ROWS:]))
    torch.testing.assert_close(scores, twin.forward(data(kind).read[ROWS:])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ALIGNED)
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_feedback_alignment_is_the_same_bits_streamed_and_resident(tmp_path, method, case):
    kind, net = ALIGNED[case]
    found = []
    for placement in PLACEMENTS:
        (tmp_path / placement).mkdir()
        found.append(trained(tmp_path / placement, method, kind, net=net, placement=placement, epochs=1))
    assert_same(*found)


@pytest.mark.parametrize("case", ALIGNED)
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_feedback_alignment_has_the_twins_loss_and_gradients_in_float64(method, case):
    kind, net = ALIGNED[case]
    work = work_of(method, kind, net=net)
    (whole,), (head,) = first_weights(method, kind, net=net)
    twin, values = twin_of(whole.double(), head.double(), method == "dfa")
    x, y = data(kind).x.double(), data(kind).y
    logits = twin.step(x, y)
    loss, found = step_of(work.objective, whole, head, shown(x, y))
    torch.testing.assert_close(loss, cross_entropy(logits, y), **EXACT)
    assert_close(found, {name: value.grad for name, value in values.items()}, **EXACT)
    # and these are not the true gradients, except the classifier's
    parts = nn.Sequential(whole, nn.Flatten(), head["classifier"] if method == "dfa" else head)
    for layer in parts.modules():
        if "feedback" in dict(layer.named_buffers(recurse=False)):
            layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    true = torch.autograd.grad(cross_entropy(parts(x), y), list(parts.parameters()))
    names = [name for name in values if not name.endswith(".bias")]
    weights = [slope for slope in true if slope.ndim > 1]
    alike = [torch.allclose(found[name], slope) for name, slope in zip(names, weights, strict=True)]
    assert alike == [False] * (len(names) - 1) + [True]


def test_feedback_weights_are_drawn_as_the_weights_are_and_are_others():
    (whole,), (head,) = first_weights("fa", "images", net="cnn:16,24")
    for layer in (whole[0].conv, whole[1].conv, head):
        bound = layer.weight[0].numel() ** -0.5  # torch's: uniform within the root of the inputs
        for values in (layer.weight.detach(), layer.feedback):
            assert 0.97 * bound < values.abs().max() <= bound
        both = torch.stack([layer.weight.detach().flatten(), layer.feedback.flatten()])
        assert torch.corrcoef(both)[0, 1].abs() < 0.3  # the least of them have 144 numbers


def test_direct_feedback_is_normal_and_another_for_each_cell():
    (_,), (head,) = first_weights("dfa", "pixels", net="mlp:900x2")
    first, second = head["feedback"].buffers()
    for values in (first, second):
        assert values.shape == (CLASSES, 900)
        assert values.std().item() == pytest.approx(CLASSES**-0.5, rel=0.05)
        assert values.mean().abs() < 0.03
        assert values.abs().max() > 3 * CLASSES**-0.5  # not uniform
    assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.1


# -- backpropagation that spares the device ------------------------------------------------------------

THRIFTY = {
    "mlp": ("pixels", UNEVEN),
    "mlp, dropout": ("pixels", f"{UNEVEN};dropout=0.3;bias=1"),
    "cnn, batch normalisation and dropout": ("images", "cnn:4,6;norm=batch;dropout=0.2"),
    "vit": ("wide images", "vit:depth=3,width=12,heads=3,patch=4,cell=2;dropout=0.1"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The final tensors of plain backpropagation."""

    @cache
    def of(case):
        kind, net = THRIFTY[case]
        return trained(tmp_path_factory.mktemp("plain"), "bp", kind, net=net)

    return of


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", THRIFTY)
@pytest.mark.parametrize("method", ["bp-checkpoint", "bp-offload"])
def test_thrifty_backpropagation_is_backpropagation_bit_for_bit(tmp_path, plain, method, case, placement):
    kind, net = THRIFTY[case]
    found = trained(tmp_path, method, kind, net=net, placement=placement)
    assert_same(found, plain(case))
    if "norm=batch" in net:
        steps = EPOCHS * -(-ROWS // BATCH)
        assert found["000/cell.1.norm.num_batches_tracked"] == steps
        assert found["000/cell.1.norm.running_mean"].abs().max() > 1e-3


@pytest.mark.parametrize(("method", "passes"), [("bp", 1), ("bp-offload", 1), ("bp-checkpoint", 2)])
def test_only_checkpoints_compute_activations_again(method, passes):
    (whole,), (head,) = first_weights(method, "pixels", net=UNEVEN)
    calls = []
    for part in whole:
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    step_of(work_of(method, "pixels", net=UNEVEN).objective, whole, head, shown(data("pixels").x, data("pixels").y))
    assert len(calls) == 3 * passes


# -- the perceptron ------------------------------------------------------------------------------------


@cache
def perceptron_reference(kind):
    _, (head,) = first_weights("slp", kind)
    optimizer = torch.optim.Adam(head.parameters(), lr=LR, fused=True)
    for epoch in range(EPOCHS):
        for batch in shuffled(SEED, epoch, ROWS, BATCH):
            logits = head(data(kind).x[batch].flatten(1))
            optimizer.zero_grad()
            (cross_entropy(logits, data(kind).y[batch], reduction="sum") / len(batch)).backward()
            optimizer.step()
    return head, learned("000", optimizer, {f"head.{name}": value for name, value in head.named_parameters()})


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["pixels", "odd images"])
def test_the_perceptron_is_one_linear_layer_bit_for_bit(tmp_path, kind, placement):
    run = finished(tmp_path, "slp", kind, placement=placement)
    head, expected = perceptron_reference(kind)
    assert_same(units(run.path), expected)
    assert sorted(expected)[:2] == ["000/head.bias", "000/head.weight"]
    assert head.weight.shape == (CLASSES, data(kind).x[0].numel())
    with torch.no_grad():
        scores = head(data(kind).read[ROWS:].flatten(1))
    torch.testing.assert_close(torch.from_numpy(run.scores(data(kind).raw[ROWS:])), scores)
