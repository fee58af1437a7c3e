"""LBP's other cells, Forward-Forward, SymBa, and Mono-Forward on lcmlp: the machine against slow twins."""

from __future__ import annotations

from functools import cache

import numpy as np
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
    PLACEMENTS,
    ROWS,
    SEED,
    UNEVEN,
    WEIGHT_DECAY,
    assert_classifier_close,
    assert_close,
    assert_same,
    classifier_blocks,
    data,
    finished,
    first_weights,
    gradients,
    joined_of,
    keyed_noise,
    learned,
    shown,
    split_off_classifier,
    step_of,
    trained,
    units,
    work_of,
)
from reference import cae, ff, gan, lbp, mf
from reference.batches import as_they_lie, shuffled
from torch.nn.functional import cross_entropy, linear, pad, rms_norm

from edgetrain.keys import per_sample

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")


def parameters_of(module, *names):
    """Values at dotted names."""
    return [module.get_parameter(name).detach() for name in names]


# -- Local Back-Propagation ----------------------------------------------------------------------------

CONVOLUTIONAL = {"cell.conv.weight": "w", "cell.conv.bias": "b", "head.0.weight": "v", "head.0.bias": "c"}


@cache
def convolutional_reference(schedule):
    """Final tensors of the cells, and the classifier."""
    modules, heads = first_weights("lbp-cae", "odd images", net="cnn:5,4")
    cells = []
    for module, head in zip(modules, heads, strict=True):
        values = parameters_of(module, "conv.weight", "conv.bias") + parameters_of(head, "0.weight", "0.bias")
        cells.append(cae.Cell(values, LR, WEIGHT_DECAY))
    blocks = classifier_blocks([5 * 4 * 3, 4 * 2 * 2])
    classifier = lbp.Classifier(joined_of(blocks), blocks["head.0.bias"], 2 * LR, WEIGHT_DECAY)
    given = data("odd images")
    getattr(cae, schedule)(cells, classifier, given.x, given.y, SEED, EPOCHS, BATCH)
    found = {}
    for index, cell in enumerate(cells):
        values = {name: getattr(cell, key) for name, key in CONVOLUTIONAL.items()}
        found |= learned(f"{index:03}", cell.optimizer, values)
    return found, classifier


@EVERY_WAY
def test_convolutional_autoencoders_on_odd_sides_are_the_plain_loop_bit_for_bit(tmp_path, schedule, placement):
    """7x6 becomes 4x3 and then 2x2; only the classifier is not bitwise (see ``assert_classifier_close``)."""
    values = {"net": "cnn:5,4", "schedule": schedule, "placement": placement}
    found, blocks = split_off_classifier(trained(tmp_path, "lbp-cae", "odd images", **values))
    cells, classifier = convolutional_reference(schedule)
    assert_same(found, cells)
    assert_classifier_close(blocks, classifier)


GENERATOR = ("cell.linear.weight", "cell.linear.bias", "head.decoder.0.weight", "head.decoder.0.bias")
DISCRIMINATOR = tuple(f"head.discriminator.{leaf}" for leaf in ("0.weight", "0.bias", "2.weight", "2.bias"))


@cache
def adversarial_reference(kind, schedule):
    modules, heads = first_weights("lbp-gan", kind, net=UNEVEN)
    cells = []
    for index, (module, head) in enumerate(zip(modules, heads, strict=True)):
        generator = parameters_of(module, "linear.weight", "linear.bias")
        generator += parameters_of(head, "decoder.0.weight", "decoder.0.bias")
        discriminator = parameters_of(head, *(name.removeprefix("head.") for name in DISCRIMINATOR))
        cells.append(gan.Cell(index, generator, discriminator, LR, WEIGHT_DECAY, keyed_noise))
    blocks = classifier_blocks([24, 23, 17])
    classifier = gan.Classifier(joined_of(blocks), blocks["head.0.bias"], 2 * LR, WEIGHT_DECAY)
    getattr(gan, schedule)(cells, classifier, data(kind).x, data(kind).y, SEED, EPOCHS, BATCH)
    found = {}
    for index, cell in enumerate(cells):
        told, made = cell.optimizers
        judging = dict(zip(DISCRIMINATOR, cell.discriminator, strict=True))
        found |= learned(f"{index:03}", told, judging, "discriminator")
        found |= learned(f"{index:03}", made, dict(zip(GENERATOR, cell.generator, strict=True)), "generator")
    return found, classifier


@pytest.mark.parametrize("kind", ["pixels", "odd images"])
@EVERY_WAY
def test_adversarial_cells_are_the_plain_loop_bit_for_bit(tmp_path, schedule, placement, kind):
    """Only the classifier is not bitwise (see ``assert_classifier_close``)."""
    values = {"net": UNEVEN, "schedule": schedule, "placement": placement}
    found, blocks = split_off_classifier(trained(tmp_path, "lbp-gan", kind, **values))
    cells, classifier = adversarial_reference(kind, schedule)
    assert_same(found, cells)
    assert_classifier_close(blocks, classifier)


# -- Forward-Forward and SymBa -------------------------------------------------------------------------

SEPARATIONS = {"ff": ff.forward_forward, "symba": ff.symba}


def wrong(epoch, samples, y):
    """The machine's wrong labels: a uniform number of each sample and epoch, the same for every cell."""
    chance = per_sample(samples.numpy(), 1, SEED, "sample", "wrong label", epoch)[:, 0].astype(np.float32)
    steps = (torch.from_numpy(chance) * (CLASSES - 1)).long().clamp(max=CLASSES - 2) + 1
    return (y + steps) % CLASSES


class WithNeutral(ff.Cell):
    """Lets the neutral label pass as well, before each update, for the one-pass classifier."""

    def __init__(self, parent, *arguments):
        super().__init__(*arguments)
        self.parent, self.handed_on, self.read = parent, None, []

    def step(self, right, bad):
        seen = ff.neutral(right, CLASSES) if self.parent is None else self.parent.handed_on
        with torch.no_grad():
            self.handed_on = self.activations(seen)
        self.read.append(ff.normed(self.handed_on))
        return super().step(right, bad)


def ff_cells(method, modules):
    cells = []
    for module in modules:
        parent = cells[-1] if cells else None
        values = parameters_of(module, "linear.weight", "linear.bias")
        cells.append(WithNeutral(parent, *values, LR, parent is None, SEPARATIONS[method]))
    return cells


def rms_of_torch(x):
    return rms_norm(x, x.shape[1:], eps=1e-8)


def separate_with_views(cells, x, y, views):
    """As ``ff.separate``; later cells read, in epoch e, what finished cells made of view e % views."""
    latents = []
    for depth, cell in enumerate(cells):
        for epoch in range(EPOCHS):
            for batch in shuffled(SEED, epoch, ROWS, BATCH):
                if depth:
                    cell.step(*(values[batch] for values in latents[epoch % views]))
                    continue
                bad = ff.labelled(x[batch], wrong(epoch, batch, y[batch]), CLASSES)
                cell.step(ff.labelled(x[batch], y[batch], CLASSES), bad)
        for view in range(0 if depth else views):
            shown_wrong = ff.labelled(x, wrong(view, torch.arange(ROWS), y), CLASSES)
            latents.append((ff.labelled(x, y, CLASSES), shown_wrong))
        latents = [tuple(through(cell, values) for values in pair) for pair in latents]


def through(cell, x):
    return torch.cat([ff.through([cell], x[batch])[-1] for batch in as_they_lie(len(x), BATCH)])


@cache
def ff_reference(method, kind, schedule, views=1):
    """Trained cells by their own RMS normalisation, and by torch's, whose last bits differ."""
    modules, _ = first_weights(method, kind, net=UNEVEN)
    x, y, both = data(kind).x, data(kind).y, []
    for normed in (ff.normed, rms_of_torch):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ff, "normed", normed)
            cells = ff_cells(method, modules)
            if schedule == "sequence":
                ff.sequence(cells, x, y, SEED, EPOCHS, BATCH, CLASSES, wrong)
            elif views == 1:
                ff.separate(cells, x, y, SEED, EPOCHS, BATCH, CLASSES, wrong, stored=0)
            else:
                separate_with_views(cells, x, y, views)
            both.append(cells)
    return both


def ff_tensors(cells):
    found = {}
    for index, cell in enumerate(cells):
        values = {"cell.linear.weight": cell.weight, "cell.linear.bias": cell.bias}
        found |= learned(f"{index:03}", cell.optimizer, values)
    return found


def assert_forward_forward(found, both):
    """Bit for bit where the twin normalises as torch does; the first cell does not normalise at all."""
    own, torchs = (ff_tensors(cells) for cells in both)
    assert_same(found, torchs)
    assert_close(found, own, **ALMOST)
    first = [name for name in found if name.startswith("000/")]
    assert_same({name: found[name] for name in first}, {name: own[name] for name in first})


@pytest.mark.parametrize("method", SEPARATIONS)
@EVERY_WAY
def test_goodness_rules_are_the_plain_loop(tmp_path, method, schedule, placement):
    run = finished(tmp_path, method, "odd images", net=UNEVEN, schedule=schedule, placement=placement)
    both = ff_reference(method, "odd images", schedule)
    assert_forward_forward(units(run.path), both)
    # the machine adds the cells' scores up on the host, the twin in place: the same order, not the same kernel
    rows = data("odd images")
    with torch.no_grad():
        expected = ff.predict(both[0], rows.read[ROWS:], CLASSES)
    torch.testing.assert_close(torch.from_numpy(run.scores(rows.raw[ROWS:])), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("views", [2, EPOCHS])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_later_cells_read_one_cached_view_after_the_other(tmp_path, placement, views):
    values = {"net": UNEVEN, "schedule": "separate", "views": views, "placement": placement}
    both = ff_reference("ff", "pixels", "separate", views)
    assert_forward_forward(trained(tmp_path, "ff", **values), both)
    once = ff_tensors(ff_reference("ff", "pixels", "separate")[1])
    assert not torch.equal(once["001/cell.linear.weight"], ff_tensors(both[1])["001/cell.linear.weight"])


def test_as_many_views_as_epochs_are_wrong_labels_drawn_anew_in_every_epoch():
    """The twin that makes latents anew for each shuffled batch; matrices of other rows, so not bitwise."""
    modules, _ = first_weights("ff", "pixels", net=UNEVEN)
    cells = ff_cells("ff", modules)
    ff.separate(cells, data("pixels").x, data("pixels").y, SEED, EPOCHS, BATCH, CLASSES, wrong, stored=None)
    assert_close(ff_tensors(cells), ff_tensors(ff_reference("ff", "pixels", "separate", EPOCHS)[0]), **ALMOST)


@pytest.mark.parametrize("method", SEPARATIONS)
@EVERY_WAY
def test_the_one_pass_classifier_reads_all_cells_normalised_activities(tmp_path, method, schedule, placement):
    values = {"schedule": schedule, "placement": placement, "classifier_epochs": EPOCHS, "classifier_lr": 2 * LR}
    run = finished(tmp_path, method, "odd images", net=UNEVEN, **values)
    found, blocks = split_off_classifier(units(run.path))
    both = ff_reference(method, "odd images", schedule)
    assert_forward_forward(found, both)  # the classifier changes nothing about the cells

    cells, rows, first = both[0], data("odd images"), classifier_blocks([24, 23, 17])
    classifier = lbp.Classifier(joined_of(first), first["head.0.bias"], 2 * LR, 0.0)
    steps = [batch for epoch in range(EPOCHS) for batch in shuffled(SEED, epoch, ROWS, BATCH)]
    parts = ff.one_pass(cells, rows.x, CLASSES)
    for number, batch in enumerate(steps):
        handed_on = [cell.read[number] for cell in cells]
        classifier.step(handed_on if schedule == "sequence" else [z[batch] for z in parts], rows.y[batch])
    assert_classifier_close(blocks, classifier)

    scores = run.evaluate((rows.raw[ROWS:], rows.labels[ROWS:])).scores["classifier"]
    with torch.no_grad():
        expected = classifier.layer(torch.cat(ff.one_pass(cells, rows.read[ROWS:], CLASSES), 1))
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SEPARATIONS)
def test_goodness_rules_have_the_twins_loss_and_gradients_in_float64(method):
    work = work_of(method, "odd images", net=UNEVEN)
    modules, _ = first_weights(method, "odd images", net=UNEVEN)
    y = data("odd images").y
    right = ff.labelled(data("odd images").x.double(), y, CLASSES)
    bad = ff.labelled(data("odd images").x.double(), wrong(0, torch.arange(ROWS), y), CLASSES)
    twins = ff_cells(method, [module.double() for module in modules])
    for module, twin in zip(modules, twins, strict=True):
        streams = {"pos": right, "neg": bad}
        goodness = [ff.goodness(twin.activations(x)) for x in streams.values()]
        loss, found = step_of(work.objective, module, None, shown(streams, y))
        right, bad = twin.step(right, bad)
        torch.testing.assert_close(loss, (twin.loss(*goodness) / ROWS).detach(), **EXACT)
        expected = {"cell.linear.weight": twin.weight, "cell.linear.bias": twin.bias}
        assert_close(found, gradients(expected), **EXACT)
        assert twin.weight.grad.abs().max() > 1e-6


# -- Mono-Forward on a locally connected net -----------------------------------------------------------

LOCAL = "lcmlp:2,3"  # an even and an odd patch


class LocalCell(mf.Cell):
    """Weights [H W, C k k, C]: for each pixel a matrix of its own, for the patch around it."""

    def activations(self, x):
        side = 2 if self.weight.shape[1] == 4 * x.shape[1] else 3
        before, after = (side - 1) // 2, side // 2
        wide, outputs = pad(x, (before, after, before, after)), []
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                patch = wide[:, :, row : row + side, column : column + side].flatten(1)
                outputs.append(patch @ self.weight[row * x.shape[3] + column])
        return torch.stack(outputs, 2).relu().view_as(x)


def local_cells(modules, heads):
    pairs = zip(modules, heads, strict=True)
    return [LocalCell(module.local.weight.detach(), head.weight.detach(), LR) for module, head in pairs]


@cache
def local_reference(schedule):
    cells, given = local_cells(*first_weights("mf", "wide images", net=LOCAL)), data("wide images")
    getattr(mf, schedule)(cells, given.x, given.y, SEED, EPOCHS, BATCH)
    found = {}
    for index, cell in enumerate(cells):
        values = {"cell.local.weight": cell.weight, "head.weight": cell.projection}
        found |= learned(f"{index:03}", cell.optimizer, values)
    return found


@EVERY_WAY
def test_locally_connected_mono_forward_is_the_plain_loop_with_explicit_patches(tmp_path, schedule, placement):
    """Nearly: one batched product of matrices sums up in another order than a product for each pixel."""
    found = trained(tmp_path, "mf", "wide images", net=LOCAL, schedule=schedule, placement=placement)
    assert_close(found, local_reference(schedule), **ALMOST)


def test_locally_connected_mono_forward_has_the_twins_loss_and_gradients_in_float64():
    work = work_of("mf", "wide images", net=LOCAL)
    modules, heads = first_weights("mf", "wide images", net=LOCAL)
    for part in (*modules, *heads):
        part.double()
    x, y = data("wide images").x.double(), data("wide images").y
    for module, head, twin in zip(modules, heads, local_cells(modules, heads), strict=True):
        scores = linear(twin.activations(x).flatten(1), twin.projection)
        loss, found = step_of(work.objective, module, head, shown(x, y))
        x = twin.step(x, y)
        torch.testing.assert_close(loss, cross_entropy(scores, y).detach(), **EXACT)
        expected = {"cell.local.weight": twin.weight, "head.weight": twin.projection}
        assert_close(found, gradients(expected), **EXACT)
