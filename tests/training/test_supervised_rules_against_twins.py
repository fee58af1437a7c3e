"""SLL, SLL+, and local prediction with similarity: the machine against their slow twins."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from machine import (
    ALMOST,
    BATCH,
    CLASSES,
    EPOCHS,
    EVERY_WAY,
    EXACT,
    LR,
    ROWS,
    SEED,
    UNEVEN,
    assert_classifier_close,
    assert_close,
    assert_same,
    classifier_blocks,
    data,
    drawn,
    finished,
    first_weights,
    gradients,
    joined_of,
    learned,
    shown,
    split_off_classifier,
    step_of,
    trained,
    units,
    work_of,
)
from reference import lbp, predsim, sll
from reference.batches import shuffled
from torch.nn.functional import cross_entropy, mse_loss, one_hot

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")


# -- Stochastic Layer-wise Learning --------------------------------------------------------------------


def projection(node):
    """A node's fixed matrix; the network's input has one too."""
    inputs = 1
    for side in node.shape[-1:] if len(node.shape) == 2 else node.shape:  # of tokens [T, D] only D
        inputs *= side
    return node.normal("projection", (inputs, CLASSES), inputs**-0.5)


class Remembers(sll.Cell):
    """Keeps what it emitted, for the classifier."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.handed_on = []

    def step(self, *arguments):
        self.handed_on.append(super().step(*arguments))
        return self.handed_on[-1]


def mask(cell, epoch, step, r):
    return drawn(cell, epoch, step, 0).keep("mask", r, 0.8)


MASKED = {"constants": "beta=1,dropout=0.2"}


@cache
def sll_reference(schedule, masked=False):
    modules, _ = first_weights("sll", "pixels", net=UNEVEN)
    nodes = work_of("sll", "pixels", net=UNEVEN).nodes
    cells = []
    for node, module in zip(nodes, modules, strict=True):
        values = [value.detach() for value in (module.linear.weight, module.linear.bias)]
        values += [projection(node), projection(node.parent)]
        cells.append(Remembers(node.index, *values, LR, p=0.2 * masked, mask=mask if masked else None))
    getattr(sll, schedule)(cells, data("pixels").x, data("pixels").y, SEED, EPOCHS, BATCH)
    found = {}
    for index, cell in enumerate(cells):
        values = {"cell.linear.weight": cell.weight, "cell.linear.bias": cell.bias}
        found |= learned(f"{index:03}", cell.optimizer, values)
    return cells, found


def last_scores(cells, rows):
    with torch.no_grad():
        for cell in cells[:-1]:
            rows = cell.activations(rows)
        return cells[-1].scores(rows)


@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@EVERY_WAY
def test_layerwise_learning_is_the_plain_loop_bit_for_bit(tmp_path, schedule, placement, masked):
    values = {"net": UNEVEN, "schedule": schedule, "placement": placement, **(MASKED if masked else {})}
    run = finished(tmp_path, "sll", **values)
    cells, expected = sll_reference(schedule, masked)
    assert_same(units(run.path), expected)
    if masked:
        unmasked = sll_reference(schedule)[1]["001/cell.linear.weight"]
        assert not torch.equal(expected["001/cell.linear.weight"], unmasked)
    rows = data("pixels")
    found = torch.from_numpy(run.scores(rows.raw[ROWS:]))  # other batches than in training, so not bitwise
    torch.testing.assert_close(found, last_scores(cells, rows.read[ROWS:]), rtol=1e-5, atol=1e-6)


@EVERY_WAY
def test_a_classifier_may_read_the_last_latents(tmp_path, schedule, placement):
    """The cells bit for bit; the classifier's error is not autograd's (see ``assert_classifier_close``)."""
    values = {"schedule": schedule, "placement": placement, "classifier_epochs": EPOCHS, "classifier_lr": 2 * LR}
    run = finished(tmp_path, "sll", net=UNEVEN, **values)
    found, blocks = split_off_classifier(units(run.path))
    cells, expected = sll_reference(schedule)
    assert_same(found, expected)

    rows, first = data("pixels"), classifier_blocks([17])
    classifier = lbp.Classifier(joined_of(first), first["head.0.bias"], 2 * LR, 0.0)
    classifier.optimizer = torch.optim.Adamax(classifier.layer.parameters(), lr=2 * LR, foreach=False)

    def last(x):
        with torch.no_grad():
            for cell in cells:
                x = cell.activations(x)
        return x

    steps = [batch for epoch in range(EPOCHS) for batch in shuffled(SEED, epoch, ROWS, BATCH)]
    for batch, handed_on in zip(steps, cells[-1].handed_on, strict=True):
        classifier.step([handed_on if schedule == "sequence" else last(rows.x[batch])], rows.y[batch])
    assert_classifier_close(blocks, classifier)
    scores = run.evaluate((rows.raw[ROWS:], rows.labels[ROWS:])).scores
    trained_scores = classifier.layer(last(rows.read[ROWS:])).detach()
    torch.testing.assert_close(torch.from_numpy(scores["classifier"]), trained_scores, rtol=1e-5, atol=1e-5)
    own = last_scores(cells, rows.read[ROWS:])
    torch.testing.assert_close(torch.from_numpy(scores["last"]), own, rtol=1e-5, atol=1e-6)


# -- SLL+ ----------------------------------------------------------------------------------------------

READINGS = ("class", "mean")


def vit(reading):
    return f"vit:depth=3,width=12,heads=3,patch=4,cell=2;tokens={reading}"


class TokenCell:
    """Transformer blocks under the twin's loss; what is inside a cell is torch's own backpropagation."""

    def __init__(self, module, node, how):
        self.module, self.how = module, how
        self.r, self.r_parent = projection(node), projection(node.parent)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def activations(self, x):
        return self.module(x)

    def step(self, x, y, epoch, number):
        tokens = self.module(x)
        loss = sll.token_loss(tokens, x, y, self.r, self.r_parent, self.how)
        self.optimizer.zero_grad()
        (loss / len(x)).backward()
        self.optimizer.step()
        return tokens.detach()


@cache
def token_reference(reading, schedule):
    modules, _ = first_weights("sll+", "wide images", net=vit(reading))
    nodes = work_of("sll+", "wide images", net=vit(reading)).nodes
    cells = [TokenCell(module, node, reading) for module, node in zip(modules, nodes, strict=True)]
    getattr(sll, schedule)(cells, data("wide images").x, data("wide images").y, SEED, EPOCHS, BATCH)
    found = {}
    for index, cell in enumerate(cells):
        values = {f"cell.{name}": value for name, value in cell.module.named_parameters()}
        found |= learned(f"{index:03}", cell.optimizer, values)
    return found


@pytest.mark.parametrize("reading", READINGS)
@EVERY_WAY
def test_blocks_that_learn_layerwise_are_the_plain_loop_bit_for_bit(tmp_path, schedule, placement, reading):
    values = {"net": vit(reading), "schedule": schedule, "placement": placement}
    assert_same(trained(tmp_path, "sll+", "wide images", **values), token_reference(reading, schedule))


@pytest.mark.parametrize("reading", READINGS)
def test_blocks_have_the_twins_loss_and_gradients_in_float64(reading):
    work = work_of("sll+", "wide images", net=vit(reading))
    x, y = data("wide images").x.double(), data("wide images").y
    for node, module, head in zip(work.nodes, *first_weights("sll+", "wide images", net=vit(reading)), strict=True):
        tokens = module.double()(x)
        own, parent = projection(node).double(), projection(node.parent).double()
        total = sll.token_loss(tokens, x, y, own, parent, reading) / ROWS
        names = [name for name, _ in module.named_parameters()]
        slopes = torch.autograd.grad(total, list(module.parameters()))
        loss, found = step_of(work.objective, module, head.double(), shown(x, y))
        torch.testing.assert_close(loss, total.detach(), **EXACT)
        assert_close(found, {f"cell.{name}": slope for name, slope in zip(names, slopes, strict=True)}, **EXACT)
        x = tokens.detach()


# -- local prediction and similarity -------------------------------------------------------------------

PREDSIM = {
    "dense": ("pixels", UNEVEN),
    "dense, no biases": ("pixels", f"{UNEVEN};bias=0"),
    "dense, no normalisation": ("pixels", f"{UNEVEN};norm=none"),
    "convolutional": ("odd images", "cnn:6,5"),
    "convolutional, no biases": ("odd images", "cnn:6,5;bias=0"),
}


class InTheMachinesOrder(predsim.Cell):
    """The same formulas with torch's mean squared error, and lengths from squares instead of its vector norm."""

    def loss(self, a, y):
        logits = self.logits(a)
        alike = [of_length_one(rows) for rows in (self.rows(a), one_hot(y, CLASSES).to(a.dtype))]
        found, wanted = ((rows @ rows.T).clamp(-1, 1) for rows in alike)
        total = predsim.PREDICTION * cross_entropy(logits, y, reduction="sum")
        return total + predsim.SIMILARITY * mse_loss(found, wanted, reduction="none").mean() * len(a)


def of_length_one(rows):
    centred = rows - rows.mean(1, keepdim=True)
    return centred / (predsim.TINY + centred.square().sum(1, keepdim=True).sqrt())


def predsim_cells(modules, heads, twin=predsim.Cell):
    cells = []
    for module, head in zip(modules, heads, strict=True):
        layer = module.conv if "conv" in dict(module.named_children()) else module.linear
        bias = None if layer.bias is None else layer.bias.detach()
        prediction = head["predict"].weight.detach(), head["predict"].bias.detach()
        mapping, norm = head["similarity"].weight.detach(), getattr(module, "norm", None)
        pool = layer.weight.ndim == 4
        cells.append(twin(layer.weight.detach(), bias, norm, prediction, mapping, LR, pool))
    return cells


def predsim_parameters(cell):
    layer = "conv" if cell.weight.ndim == 4 else "linear"
    values = {f"cell.{layer}.weight": cell.weight, f"cell.{layer}.bias": cell.bias}
    values |= {f"cell.norm.{name}": value for name, value in cell.norm.named_parameters()}
    values |= {"head.predict.weight": cell.head[0], "head.predict.bias": cell.head[1]}
    values |= {"head.similarity.weight": cell.mapping}
    return {name: value for name, value in values.items() if value is not None}


@cache
def predsim_reference(case, schedule, twin):
    kind, net = PREDSIM[case]
    cells = predsim_cells(*first_weights("predsim", kind, net=net), twin)
    getattr(predsim, schedule)(cells, data(kind).x, data(kind).y, SEED, EPOCHS, BATCH)
    found = {}
    for index, cell in enumerate(cells):
        found |= learned(f"{index:03}", cell.optimizer, predsim_parameters(cell))
        found |= {f"{index:03}/cell.norm.{name}": value for name, value in cell.norm.named_buffers()}
    return cells, found


@pytest.mark.parametrize("case", PREDSIM)
@EVERY_WAY
def test_prediction_and_similarity_are_the_plain_loop(tmp_path, schedule, placement, case):
    """Bit for bit with the machine's order of operations in the similarity, nearly so with the twin's own.

    Running statistics of batch normalisation are among the tensors.
    """
    kind, net = PREDSIM[case]
    run = finished(tmp_path, "predsim", kind, net=net, schedule=schedule, placement=placement)
    found = units(run.path)
    cells, expected = predsim_reference(case, schedule, InTheMachinesOrder)
    assert_same(found, expected)
    if case not in ("dense", "convolutional"):
        # elsewhere a bias before normalisation has no gradient but rounding, and Adam makes full steps of that
        assert_close(found, predsim_reference(case, schedule, predsim.Cell)[1], **ALMOST)
    x, rows = data(kind).read[ROWS:], data(kind).raw[ROWS:]
    for cell in cells[:-1]:
        x = cell.finished(x)
    scores = torch.from_numpy(run.scores(rows))  # other batches than in training, so not bitwise
    torch.testing.assert_close(scores, cells[-1].scores(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", PREDSIM)
def test_prediction_and_similarity_have_the_twins_loss_and_gradients_in_float64(case):
    kind, net = PREDSIM[case]
    work = work_of("predsim", kind, net=net)
    modules, heads = first_weights("predsim", kind, net=net)
    for part in (*modules, *heads):
        part.double()
    x, y = data(kind).x.double(), data(kind).y
    for module, head, twin in zip(modules, heads, predsim_cells(modules, heads), strict=True):
        total = twin.loss(twin.activations(x), y).detach() / ROWS
        loss, found = step_of(work.objective, module, head, shown(x, y))
        x = twin.step(x, y)
        torch.testing.assert_close(loss, total, **EXACT)
        assert_close(found, gradients(predsim_parameters(twin)), **EXACT)


@pytest.mark.parametrize("net", ["mlp:1;act=relu", "mlp:8;norm=none;bias=0"], ids=["one unit", "a black row"])
def test_a_sample_whose_similarity_row_is_constant_harms_nobodys_gradient(net):
    work = work_of("predsim", "pixels", net=net)
    (module,), (head,) = first_weights("predsim", "pixels", net=net)
    (twin,) = predsim_cells([module.double()], [head.double()])
    x, y = data("pixels").x.double(), data("pixels").y
    x[0] = 0
    twin.step(x, y)
    assert all(slope.isfinite().all() for slope in gradients(predsim_parameters(twin)).values())
    _, found = step_of(work.objective, module, head, shown(x, y))
    assert all(slope.isfinite().all() for slope in found.values())
