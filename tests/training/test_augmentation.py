"""Augmentation: each operation against a loop over samples, and what runs make of it against a plain loop."""

from __future__ import annotations

from functools import cache
from math import floor

import numpy as np
import pytest
import torch
from machine import (
    BATCH,
    CLASSES,
    EPOCHS,
    LR,
    PLACEMENTS,
    ROWS,
    SEED,
    assert_same,
    data,
    finished,
    first_weights,
    learned,
    trained,
    units,
)
from reference import ff, mf
from reference.batches import as_they_lie, shuffled
from torch.nn.functional import linear

from edgetrain.data.augment import Augmentation, crop, cutout, flip
from edgetrain.keys import epoch_order, per_sample
from edgetrain.objectives.ff import ForwardForward
from edgetrain.objectives.mf import MonoForward

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")

ALL = "crop,flip,cutout"
NET = "cnn:4,5"

# -- the operations, pixel by pixel --------------------------------------------------------------------


def cropped(image, u):
    """Each side moves by up to an eighth of it, and at least by up to one pixel; what comes in is black."""
    height, width = image.shape[1:]
    most = [max(1, height // 8), max(1, width // 8)]
    down, right = (min(int(value * (2 * reach + 1)), 2 * reach) - reach for value, reach in zip(u, most, strict=True))
    made = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                made[:, row, column] = image[:, row + down, column + right]
    return made


def flipped(image, u):
    width = image.shape[2]
    if u[0] >= 0.5:
        return image
    return torch.stack([image[:, :, width - 1 - column] for column in range(width)], 2)


def cut_out(image, u):
    """A square of half the side is black, its middle pixel (the later of two) anywhere."""
    height, width = image.shape[1:]
    centre = floor(u[0] * height), floor(u[1] * width)
    made = image.clone()
    for row in range(height):
        for column in range(width):
            down, right = row - centre[0] + height // 2 // 2, column - centre[1] + width // 2 // 2
            if 0 <= down < height // 2 and 0 <= right < width // 2:
                made[:, row, column] = 0
    return made


NAIVE = {"crop": (cropped, crop, 2), "flip": (flipped, flip, 1), "cutout": (cut_out, cutout, 2)}


def numbers(rows, columns):
    """Uniform numbers, the ends of the interval among them."""
    u = torch.rand(rows, columns, generator=torch.Generator().manual_seed(6))
    u[0], u[1], u[2] = 0.0, 1 - 2**-24, 1.0  # a number just below 1 is 1 once it is float32
    return u


@pytest.mark.parametrize("sides", [(9, 20), (20, 9), (7, 6), (32, 32), (2, 3)], ids=str)
@pytest.mark.parametrize("name", NAIVE)
def test_an_operation_is_what_a_loop_over_the_samples_makes(name, sides):
    naive, operation, columns = NAIVE[name]
    x = torch.rand(24, 3, *sides, generator=torch.Generator().manual_seed(5)) + 0.1
    u = numbers(len(x), columns)
    found, before = operation(x, u), x.clone()
    expected = torch.stack([naive(image, row) for image, row in zip(x, u.tolist(), strict=True)])
    assert found.shape == x.shape
    assert torch.equal(found, expected)
    assert torch.equal(x, before)  # the inputs stay as they are
    differs = (found != x).flatten(1).any(1)
    assert differs.any()
    assert name != "flip" or not differs.all()


def test_crops_reach_every_offset_equally_often():
    x = torch.zeros(9000, 1, 16, 32)
    x[:, 0, 8, 16] = 1
    where = crop(x, torch.rand(9000, 2, generator=torch.Generator().manual_seed(4)))[:, 0].nonzero()
    assert len(where) == 9000
    down, right = np.unique(where[:, 1], return_counts=True), np.unique(where[:, 2], return_counts=True)
    assert down[0].tolist() == [6, 7, 8, 9, 10]  # 16 / 8 = 2 either way
    assert right[0].tolist() == list(range(12, 21))  # 32 / 8 = 4 either way
    assert min(down[1]) > 0.85 * 9000 / 5
    assert min(right[1]) > 0.85 * 9000 / 9


def test_a_cut_out_square_has_half_of_the_side():
    left = cutout(torch.ones(1, 1, 32, 32), torch.full((1, 2), 0.5))
    assert (left == 0).sum() == 16 * 16  # DeVries and Taylor's 16x16 of 32x32


def augmented(names, x, u):
    """Images under several operations, sample by sample, in the order in which they are named."""
    made = []
    for image, row in zip(x, u.tolist(), strict=True):
        for name in names.split(","):
            naive, _, columns = NAIVE[name]
            image, row = naive(image, row[:columns]), row[columns:]
        assert not row
        made.append(image)
    return torch.stack(made)


@pytest.mark.parametrize("names", ["crop", "flip,cutout", "cutout,flip,crop", ALL])
def test_operations_follow_each_other_with_numbers_of_their_own(names):
    x = torch.rand(20, 2, 9, 12, generator=torch.Generator().manual_seed(5))
    change = Augmentation.parse(names, (2, 9, 12))
    u = numbers(len(x), change.columns)
    assert torch.equal(change(x, u), augmented(names, x, u))


# -- what the machine shows ----------------------------------------------------------------------------


def keyed(samples, epoch, names):
    """The numbers that belong to samples in an epoch, as the machine draws them."""
    columns = sum(NAIVE[name][2] for name in names.split(","))
    drawn = per_sample(np.asarray(samples), columns, SEED, "sample", "augmentation", epoch)
    return torch.from_numpy(drawn.astype(np.float32))


def changed(kind, samples, epoch, names=ALL):
    return augmented(names, data(kind).x[samples], keyed(samples, epoch, names))


@pytest.fixture
def inputs_of_first_cell(monkeypatch):
    """What a rule's first cell is shown, part by part."""
    seen = []

    def watch(rule):
        loss = rule.loss

        def looks(self, phase, cell, head, batch):
            if next(iter(batch.streams.values())).shape[1:] == data("odd images").x.shape[1:]:
                seen.append({name: values.clone() for name, values in batch.streams.items()})
            return loss(self, phase, cell, head, batch)

        monkeypatch.setattr(rule, "loss", looks)
        return seen

    return watch


def by_sample(seen, stream="x"):
    """(epoch, sample) -> the image that was shown."""
    rows = torch.cat([streams[stream] for streams in seen])
    assert len(rows) == EPOCHS * ROWS
    order = np.concatenate([epoch_order(SEED, epoch, ROWS) for epoch in range(EPOCHS)])
    return {(row // ROWS, int(sample)): image for row, (sample, image) in enumerate(zip(order, rows, strict=True))}


@pytest.mark.parametrize(
    ("batch", "micro", "placement"), [(16, 16, "stream"), (16, 5, "resident"), (33, 33, "resident"), (70, 11, "stream")]
)
def test_what_happens_to_a_sample_depends_on_seed_epoch_and_sample_alone(
    tmp_path, inputs_of_first_cell, batch, micro, placement
):
    seen = inputs_of_first_cell(MonoForward)
    values = {"schedule": "sequence", "batch_size": batch, "micro_batch": micro, "placement": placement}
    trained(tmp_path, "mf", "odd images", net=NET, augment=ALL, **values)
    found = by_sample(seen)
    samples = torch.arange(ROWS)
    for epoch in range(EPOCHS):
        expected = changed("odd images", samples, epoch)
        assert torch.equal(torch.stack([found[epoch, sample] for sample in range(ROWS)]), expected)
    again = sum(torch.equal(found[0, sample], found[1, sample]) for sample in range(ROWS))
    assert again < ROWS / 4  # every epoch is a fresh one


def test_another_seed_changes_samples_in_another_way(tmp_path, inputs_of_first_cell):
    seen = inputs_of_first_cell(MonoForward)
    trained(tmp_path, "mf", "odd images", net=NET, augment=ALL, schedule="sequence", seed=SEED + 1)
    order = torch.from_numpy(epoch_order(SEED + 1, 0, ROWS))[:BATCH]
    same = (seen[0]["x"] == changed("odd images", order, 0)).flatten(1).all(1)
    assert same.sum() < BATCH / 4


def test_labels_are_written_over_changed_images(tmp_path, inputs_of_first_cell):
    seen, y = inputs_of_first_cell(ForwardForward), data("odd images").y
    values = {"net": "mlp:9,8", "augment": ALL, "schedule": "sequence", "classifier_epochs": EPOCHS}
    trained(tmp_path, "ff", "odd images", **values)
    right, bad, blank = (by_sample(seen, stream) for stream in ("pos", "neg", "neutral"))
    for epoch in range(EPOCHS):
        x = changed("odd images", torch.arange(ROWS), epoch)
        found = [torch.stack([each[epoch, sample] for sample in range(ROWS)]) for each in (right, bad, blank)]
        assert torch.equal(found[0].flatten(1), ff.labelled(x, y, CLASSES))
        assert torch.equal(found[1].flatten(1)[:, CLASSES:], x.flatten(1)[:, CLASSES:])
        assert torch.equal(found[2].flatten(1), ff.neutral(x, CLASSES))
        named = found[1].flatten(1)[:, :CLASSES]
        assert torch.equal(named.sum(1), torch.ones(ROWS))
        assert not (named.argmax(1) == y).any()


# -- whole runs ----------------------------------------------------------------------------------------


def mf_cells(kind):
    pairs = zip(*first_weights("mf", kind, net=NET), strict=True)
    return [mf.Cell(module.conv.weight.detach(), head.weight.detach(), LR) for module, head in pairs]


def mf_tensors(cells):
    found = {}
    for index, cell in enumerate(cells):
        values = {"cell.conv.weight": cell.weight, "head.weight": cell.projection}
        found |= learned(f"{index:03}", cell.optimizer, values)
    return found


@cache
def fresh_every_epoch(kind, names):
    cells, y = mf_cells(kind), data(kind).y
    for epoch in range(EPOCHS):
        for batch in shuffled(SEED, epoch, ROWS, BATCH):
            a = changed(kind, batch, epoch, names)
            for cell in cells:
                a = cell.step(a, y[batch])
    return mf_tensors(cells)


@cache
def cached_views(kind, names, views):
    """The first cell sees a fresh view in every epoch; it leaves ``views`` of them, which later cells take in turn."""
    cells, y, latents = mf_cells(kind), data(kind).y, []
    for depth, cell in enumerate(cells):
        for epoch in range(EPOCHS):
            for batch in shuffled(SEED, epoch, ROWS, BATCH):
                x = latents[epoch % views][batch] if depth else changed(kind, batch, epoch, names)
                cell.step(x, y[batch])
        made = latents or [changed(kind, torch.arange(ROWS), view, names) for view in range(views)]
        with torch.no_grad():
            parts = list(as_they_lie(ROWS, BATCH))
            latents = [torch.cat([cell.activations(view[batch]) for batch in parts]) for view in made]
    return mf_tensors(cells)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("kind", "names"), [("images", ALL), ("wide images", "flip,crop")])
def test_sequence_is_the_plain_loop_over_fresh_images_bit_for_bit(tmp_path, placement, kind, names):
    values = {"net": NET, "augment": names, "schedule": "sequence", "placement": placement}
    run = finished(tmp_path, "mf", kind, **values)
    assert_same(units(run.path), fresh_every_epoch(kind, names))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("kind", "names", "views"), [("images", ALL, 1), ("images", ALL, 2), ("wide images", "crop", 4)]
)
def test_separate_is_the_plain_loop_over_cached_views_bit_for_bit(tmp_path, placement, kind, names, views):
    values = {"net": NET, "augment": names, "views": views, "schedule": "separate", "placement": placement}
    run = finished(tmp_path, "mf", kind, **values)
    expected = cached_views(kind, names, views)
    assert_same(units(run.path), expected)
    if views > 1:
        assert not torch.equal(expected["001/cell.conv.weight"], cached_views(kind, names, 1)["001/cell.conv.weight"])
    # classes are looked for in the images as they are
    a, scores = data(kind).read[ROWS:], 0
    for cell in load(expected):
        a = cell.activations(a)
        scores = scores + linear(a.flatten(1), cell.projection)
    found = torch.from_numpy(run.scores(data(kind).raw[ROWS:]))
    torch.testing.assert_close(found, scores.detach(), rtol=1e-5, atol=1e-6)


def load(tensors):
    """Cells with trained weights."""
    names = ("cell.conv.weight", "head.weight")
    return [mf.Cell(*(tensors[f"{index:03}/{name}"] for name in names), LR) for index in range(2)]
