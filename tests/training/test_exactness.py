"""Streaming is only an order: the machine against plain PyTorch (tests/reference), bit for bit."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from machine import (
    BATCH,
    CLASSES,
    EPOCHS,
    LR,
    ROWS,
    SCHEDULES,
    SEED,
    TEST_ROWS,
    UNEVEN,
    WEIGHT_DECAY,
    assert_classifier_close,
    assert_close,
    assert_same,
    classifier_blocks,
    classifier_of,
    data,
    first_weights,
    flat,
    joined_of,
    keyed_noise,
    learned,
    reader_of,
    settings,
    split_off_classifier,
    state_of,
    train_steps,
    trained,
    units,
)
from reference import bp, lbp, mf
from torch import nn
from torch.nn.functional import cross_entropy

from edgetrain.store.run import RunFolder
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.latents import DeviceLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.outputs import Tally
from edgetrain.stream.span import Span
from edgetrain.training.callbacks import Callback
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job, plan_job
from edgetrain.units import ceil_mb

pytestmark = pytest.mark.usefixtures("one_thread", "peaks_unknown")


# -- Mono-Forward --------------------------------------------------------------------------------------


def mf_reference(kind, schedule, net=UNEVEN, size=BATCH, kept=mf.unchanged):
    modules, heads = first_weights("mf", kind, net=net)
    layer = "conv" if net.startswith("cnn") else "linear"
    cells = [
        mf.Cell(getattr(module, layer).weight.detach(), head.weight.detach(), LR)
        for module, head in zip(modules, heads, strict=True)
    ]
    getattr(mf, schedule)(cells, data(kind).x, data(kind).y, SEED, EPOCHS, size, kept)
    found = {}
    for index, cell in enumerate(cells):
        names = {f"cell.{layer}.weight": cell.weight, "head.weight": cell.projection}
        found |= learned(f"{index:03}", cell.optimizer, names)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["pixels", "floats"])
def test_streamed_mono_forward_is_the_plain_loop_bit_for_bit(tmp_path, kind, schedule):
    found = trained(tmp_path, "mf", kind, net=UNEVEN, schedule=schedule, placement="stream")
    assert_same(found, mf_reference(kind, schedule))


@pytest.mark.parametrize(
    ("size", "schedule"),
    [(11, "sequence"), (69, "separate"), (69, "sequence"), (200, "sequence")],
    ids=["odd", "last batch of one row, separate", "last batch of one row, sequence", "larger than the data"],
)
def test_any_batch_size_is_the_plain_loop_bit_for_bit(tmp_path, size, schedule):
    values = {"schedule": schedule, "batch_size": size, "micro_batch": size, "placement": "stream"}
    assert_same(trained(tmp_path, "mf", net=UNEVEN, **values), mf_reference("pixels", schedule, size=size))


@pytest.mark.parametrize("placement", ["stream", "resident"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_convolutional_cells_are_the_plain_loop_bit_for_bit(tmp_path, schedule, placement):
    found = trained(tmp_path, "mf", "images", net="cnn:4,8", schedule=schedule, placement=placement)
    assert_same(found, mf_reference("images", schedule, net="cnn:4,8"))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_latents_are_the_plain_loop_that_rounds_what_it_emits(tmp_path, dtype, schedule):
    found = trained(tmp_path, "mf", net=UNEVEN, schedule=schedule, latent_dtype=dtype, placement="stream")
    expected = mf_reference("pixels", schedule, kept=lambda a: a.to(getattr(torch, dtype)).float())
    assert_same(found, expected)
    exact = mf_reference("pixels", schedule)
    assert not torch.equal(found["001/cell.linear.weight"], exact["001/cell.linear.weight"])


# -- Local Back-Propagation ----------------------------------------------------------------------------


def lbp_reference(method, kind, schedule):
    """Final tensors of the cells, and the classifier with its first blocks."""
    modules, heads = first_weights(method, kind, net=UNEVEN)
    noise = keyed_noise if method == "lbp-dae" else None
    cells = []
    for index, (module, head) in enumerate(zip(modules, heads, strict=True)):
        first = [module.linear.weight, module.linear.bias, head[0].weight, head[0].bias]
        cells.append(lbp.Cell(index, [value.detach() for value in first], LR, WEIGHT_DECAY, noise))
    blocks = classifier_blocks([len(cell.w) for cell in cells])
    classifier = lbp.Classifier(joined_of(blocks), blocks["head.0.bias"], 2 * LR, WEIGHT_DECAY)
    getattr(lbp, schedule)(cells, classifier, data(kind).x, data(kind).y, SEED, EPOCHS, BATCH)
    found = {}
    for index, cell in enumerate(cells):
        names = {"cell.linear.weight": cell.w, "cell.linear.bias": cell.b}
        names |= {"head.0.weight": cell.v, "head.0.bias": cell.c}
        found |= learned(f"{index:03}", cell.optimizer, names)
    return found, classifier


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("method", "kind"), [("lbp-ae", "pixels"), ("lbp-ae", "floats"), ("lbp-dae", "pixels")])
def test_streamed_autoencoders_are_the_plain_loop_bit_for_bit(tmp_path, method, kind, schedule):
    found = trained(tmp_path, method, kind, net=UNEVEN, schedule=schedule, placement="stream")
    cells, classifier = lbp_reference(method, kind, schedule)
    streamed, blocks = split_off_classifier(found)
    assert_same(streamed, cells)
    assert_classifier_close(blocks, classifier)
    assert blocks["optim.step.head.0.bias.step"] == EPOCHS * 5


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("micro_batch", [16, 5])
def test_the_classifier_without_concatenation_is_one_linear_layer_in_float64(micro_batch, resident):
    draw, latents, widths = torch.Generator().manual_seed(1), [], [24, 23, 17]
    for width in widths:
        latents.append(DeviceLatents(ROWS, "float32", False))
        latents[-1].put(0, {"x": torch.randn(ROWS, width, generator=draw)})
    first, y = classifier_blocks(widths, torch.float64), data("pixels").y
    made = classifier_of(widths, OptimizerRecipe("adamw", LR, WEIGHT_DECAY), state_of(first), resident)
    classifier = lbp.Classifier(joined_of(first), first["head.0.bias"], LR, WEIGHT_DECAY)
    order = np.random.default_rng(2).permutation(ROWS)
    reader = reader_of(latents, y, prepare=lambda streams, y, draws: {"x": streams["x"].double()})
    train_steps(made, reader, Span(ROWS, BATCH, micro_batch, 0, 5, order))
    z = [each.formats["x"].decode(each.tensors["x"]).double() for each in latents]
    for batch in torch.from_numpy(order).split(BATCH):
        classifier.step([values[batch] for values in z], y[batch])
    state = flat(made.state_dict())
    torch.testing.assert_close(joined_of(state), classifier.layer.weight.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(state["head.0.bias"], classifier.layer.bias.detach(), rtol=0, atol=1e-13)


# -- backpropagation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("kind", ["pixels", "floats"])
def test_backpropagation_is_plain_pytorch_bit_for_bit(tmp_path, kind, bias):
    net = f"{UNEVEN};bias={int(bias)}"
    (whole,), (head,) = first_weights("bp", kind, net=net)
    layers = [*(part.linear for part in whole), head]
    network = bp.Network([layer.weight for layer in layers], [layer.bias for layer in layers], LR)
    bp.train(network, data(kind).x, data(kind).y, SEED, EPOCHS, BATCH)
    names = [*(f"cell.{index}.linear" for index in range(3)), "head"]
    parameters = {
        f"{name}.{leaf}": value
        for name, layer in zip(names, network.layers, strict=True)
        for leaf, value in layer.named_parameters()
    }
    assert_same(trained(tmp_path, "bp", kind, net=net), learned("000", network.optimizer, parameters))


# -- what may differ without changing a bit ------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The final tensors of the run that leaves everything as it comes, once for each set of values."""

    @cache
    def of(method, items, kind="pixels"):
        return trained(tmp_path_factory.mktemp("plain"), method, kind, **dict(items))

    return of


FREE = {
    "streamed, without threads": {"placement": "stream", "prefetch": 0},
    "streamed, far ahead, a checkpoint at every frontier": {
        "placement": "stream", "prefetch": 7, "checkpoint_every": 0.0
    },
    "resident": {"placement": "resident"},
    "resident, without threads, a checkpoint at every frontier": {
        "placement": "resident", "prefetch": 0, "checkpoint_every": 0.0
    },
    "latents kept, every step measured": {"keep_latents": True, "meter": "full"},
}  # fmt: skip


@pytest.mark.parametrize("free", FREE.values(), ids=FREE)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", ["mf", "lbp-dae"])
def test_no_free_choice_changes_a_bit(tmp_path, plain, method, schedule, free):
    expected = plain(method, (("schedule", schedule),))
    assert_same(trained(tmp_path, method, schedule=schedule, **free), expected)


def test_kept_latents_are_left_in_the_run_folder_and_others_are_not(tmp_path):
    left = []
    for keep in (True, False):
        trained(tmp_path / str(keep), "mf", keep_latents=keep, placement="stream", epochs=1)
        left.append({file.name for file in (tmp_path / str(keep) / "run" / "latents").glob("*.rows")})
    assert {"001.x.rows", "002.x.rows"} <= left[0]
    assert left[1] == set()


class LooksAtScratch(Callback):
    """Notes the cells on the scratch disk at the end of each visit."""

    def __init__(self, path):
        self.path, self.seen = path, set()

    def visited(self, progress):
        self.seen |= {file.name for file in self.path.glob("scratch/*")}


@pytest.mark.parametrize(("method", "placement"), [("mf", "stream"), ("lbp-ae", "auto")])
def test_cells_that_wait_on_disk_or_on_the_host_come_back_the_same(tmp_path, plain, method, placement):
    expected = plain(method, (("schedule", "sequence"),))
    values = settings(method, schedule="sequence", placement=placement)
    least = plan_job(open_job(values, data=data("pixels").set)).host_bytes
    for name, budget, spills in (("no room", ceil_mb(least), True), ("room", 100.0, False)):
        path = tmp_path / name
        callback = LooksAtScratch(path)
        fit(values.with_values({"max_host_mb": budget}), path, data=data("pixels").set, callback=callback)
        assert bool(callback.seen) == spills
        assert_same(units(path), expected)


@pytest.mark.parametrize(
    ("method", "given"),
    [("mf", {"schedule": "separate"}), ("lbp-ae", {"schedule": "sequence"}), ("bp", {})],
    ids=["mf", "lbp-ae", "bp"],
)
def test_no_device_budget_changes_a_bit_at_the_same_micro_batch(tmp_path, plain, method, given):
    plan = plan_job(open_job(settings(method, **given), data=data("pixels").set))
    for budget in (ceil_mb(plan.predicted_peak), 1000.0):
        path = tmp_path / str(budget)
        path.mkdir()
        found = trained(path, method, max_gpu_mb=budget, **given)
        assert_same(found, plain(method, tuple(given.items())))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("method", "dtype"), [("mf", "float16"), ("mf", "bfloat16"), ("mf", "uint8"), ("lbp-ae", "uint8")]
)
def test_latents_of_any_dtype_are_the_same_streamed_and_resident(tmp_path, plain, method, dtype, schedule):
    expected = plain(method, (("schedule", schedule), ("latent_dtype", dtype), ("placement", "resident")))
    assert_same(trained(tmp_path, method, schedule=schedule, latent_dtype=dtype, placement="stream"), expected)
    exact = plain(method, (("schedule", schedule),))
    assert not torch.equal(expected["001/cell.linear.weight"], exact["001/cell.linear.weight"])


# -- micro-batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("method", "cut"), [("mf", 5), ("mf", [4, 16, 5]), ("lbp-dae", 5), ("lbp-dae", [4, 16, 5, 7])], ids=str
)
def test_micro_batches_add_up_to_the_batch(tmp_path, plain, method, schedule, cut):
    found = trained(tmp_path, method, schedule=schedule, micro_batch=cut, placement="stream")
    whole = plain(method, (("schedule", schedule),))
    assert_close(found, whole, 1e-5, 1e-5)
    assert any(not torch.equal(found[name], whole[name]) for name in whole)  # it was cut


@pytest.mark.parametrize(
    ("method", "cut"),
    [
        ("mf", 8),
        ("lbp-ae", 8),
        ("mf", 5),
        ("lbp-ae", [4, 16, 5, 7]),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_are_the_same_streamed_and_resident(tmp_path, method, schedule, cut):
    found = []
    for placement in ("stream", "resident"):
        (tmp_path / placement).mkdir()
        values = {"schedule": schedule, "micro_batch": cut, "placement": placement}
        found.append(trained(tmp_path / placement, method, **values))
    assert_same(*found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_at_odd_addresses_are_the_same_streamed_and_resident(tmp_path, schedule):
    found = []
    for placement in ("stream", "resident"):
        (tmp_path / placement).mkdir()
        values = {"net": "mlp:10x3", "batch_size": 33, "micro_batch": 33, "schedule": schedule}
        found.append(trained(tmp_path / placement, "mf", placement=placement, **values))
    assert_same(*found)


class Losses(Callback):
    """Keeps each visit's training loss."""

    def __init__(self):
        self.found = []

    def visited(self, progress):
        self.found.append(progress.loss)


def losses(path, method, **values):
    callback = Losses()
    fit(settings(method, **values), path, data=data("pixels").set, callback=callback)
    return callback.found


def test_noise_is_the_same_however_a_batch_is_cut(tmp_path):
    whole = losses(tmp_path / "whole", "lbp-dae", epochs=1)
    cut = losses(tmp_path / "cut", "lbp-dae", epochs=1, micro_batch=5)
    clean = losses(tmp_path / "clean", "lbp-ae", epochs=1)
    assert cut == pytest.approx(whole, rel=1e-6)
    assert clean[0] != pytest.approx(whole[0], rel=1e-3)  # other noise would show as far as this


def test_noise_of_a_step_is_drawn_whole_and_sliced():
    samples = np.arange(16)
    like, again, parts = torch.zeros(16, 21), StepDraws(SEED, 1, 2, 3, samples), []
    drawn = StepDraws(SEED, 1, 2, 3, samples).normal("noise", like)
    for first in (0, 5, 10, 15):
        parts.append(again.of(first).normal("noise", like[first : first + 5]))
    assert torch.equal(torch.cat(parts), drawn)
    for address in ((SEED + 1, 1, 2, 3), (SEED, 0, 2, 3), (SEED, 1, 1, 3), (SEED, 1, 2, 4)):
        assert not torch.equal(drawn, StepDraws(*address, samples).normal("noise", like))


# -- interrupted and resumed ---------------------------------------------------------------------------


class PowerCut(Exception):  # noqa: N818 (it is not one of our errors)
    """Stands for the end of a process."""


class Interrupts(Callback):
    """Ends the run when a visit ends, before its checkpoint."""

    def __init__(self, visit, cause: type[BaseException]):
        self.visit, self.cause = visit, cause

    def visited(self, progress):
        if progress.visit == self.visit:
            raise self.cause


RESUMED: dict[str, Any] = {"epochs": 2, "checkpoint_every": 0.0}


@pytest.mark.parametrize(
    ("method", "schedule", "visit"),
    [
        ("mf", "separate", 0),
        ("mf", "separate", 3),
        ("mf", "sequence", 1),
        ("mf", "sequence", 4),
        ("lbp-ae", "separate", 4),
        ("lbp-ae", "separate", 7),  # the classifier's last epoch: all latents are made again
        ("lbp-ae", "sequence", 3),  # the classifier's first epoch
        ("lbp-ae", "sequence", 6),
    ],
)
def test_a_run_that_was_interrupted_and_resumed_ends_the_same(tmp_path, plain, method, schedule, visit):
    values = {**RESUMED, "schedule": schedule, "placement": ("auto", "stream")[visit % 2]}
    given, path = settings(method, **values), tmp_path / "run"
    cause = (KeyboardInterrupt, PowerCut)[visit % 2]
    with pytest.raises(cause):
        fit(given, path, data=data("pixels").set, callback=Interrupts(visit, cause))
    assert not (path / "record.json").exists()
    saved = RunFolder(path).last()
    assert (0 if saved is None else saved.visits) == visit
    fit(given, path, data=data("pixels").set, resume=True)
    assert_same(units(path), plain(method, (("epochs", 2), ("schedule", schedule))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "schedule", "placement"),
    [
        ("mf", "separate", "resident"),
        ("mf", "sequence", "stream"),
        ("lbp-ae", "separate", "stream"),
        ("lbp-ae", "sequence", "resident"),
    ],
)
def test_a_run_cut_after_every_single_checkpoint_ends_the_same(
    tmp_path, plain, monkeypatch, method, schedule, placement
):
    given = settings(method, **RESUMED, schedule=schedule, placement=placement)
    path, save, cuts = tmp_path / "run", RunFolder.save, 0

    def saves_and_dies(folder, *arguments):
        nonlocal cuts
        save(folder, *arguments)
        cuts += 1
        raise PowerCut

    monkeypatch.setattr(RunFolder, "save", saves_and_dies)
    while not (path / "record.json").exists() and cuts < 60:
        with suppress(PowerCut):
            fit(given, path, data=data("pixels").set, resume=True)
    nodes, steps = 3 + (method == "lbp-ae"), 5
    emitting = nodes - 1 if schedule == "separate" else 0  # finished cells, saved before they emit
    passed = 2 * (nodes - 1) if schedule == "sequence" else 0  # visits that end between frontiers
    assert cuts == 2 * nodes * steps + emitting - passed
    assert_same(units(path), plain(method, (("epochs", 2), ("schedule", schedule))))


def test_a_run_cut_while_a_visit_is_under_way_ends_the_same(tmp_path, plain, monkeypatch):
    given, path, parts = settings("lbp-ae", **RESUMED, placement="stream"), tmp_path / "run", 0
    add = Tally.add

    def counts_and_dies(tally, step, *arguments):
        nonlocal parts
        parts += path.exists()  # planning is over
        if parts == 3 * 5 + 3:  # in the second epoch of the second cell
            raise PowerCut
        add(tally, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", counts_and_dies)
        with pytest.raises(PowerCut):
            fit(given, path, data=data("pixels").set)
    last = RunFolder(path).last()
    assert (last.visits, last.within.step) == (3, 2)
    fit(given, path, data=data("pixels").set, resume=True)
    assert_same(units(path), plain("lbp-ae", (("epochs", 2), ("schedule", "separate"))))


def test_a_run_cut_between_its_last_checkpoint_and_its_end_is_completed(tmp_path, plain, monkeypatch):
    given, path = settings("mf", **RESUMED, schedule="sequence"), tmp_path / "run"

    def dies(*arguments):
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", dies)
        with pytest.raises(PowerCut):
            fit(given, path, data=data("pixels").set)
    resumed = fit(given, path, data=data("pixels").set, resume=True)
    assert resumed.record.test_accuracy is not None
    assert_same(units(path), plain("mf", (("epochs", 2), ("schedule", "sequence"))))


# -- the finished run ----------------------------------------------------------------------------------


def test_scores_of_a_finished_run_are_those_of_the_plain_network(tmp_path):
    run = fit(settings("mf", net=UNEVEN, schedule="sequence"), tmp_path / "run", data=data("pixels").set)
    reference = mf_reference("pixels", "sequence")
    a, expected = torch.from_numpy(data("pixels").raw[ROWS:]).float() / 255, torch.zeros(TEST_ROWS, CLASSES)
    for index in range(3):
        a = (a @ reference[f"{index:03}/cell.linear.weight"].T).relu()
        expected += a @ reference[f"{index:03}/head.weight"].T
    scores = torch.from_numpy(run.scores(data("pixels").raw[ROWS:]))
    torch.testing.assert_close(scores, expected)
    assert torch.equal(scores.argmax(1), torch.from_numpy(run.predict(data("pixels").raw[ROWS:])))
    right = (expected.argmax(1) == torch.from_numpy(data("pixels").labels[ROWS:])).float().mean().item()
    assert run.record.test_accuracy == pytest.approx(right)


def test_reported_losses_are_means_over_the_samples(tmp_path):
    """One step per epoch, so that the first visit's loss is that of the first weights."""
    found = losses(tmp_path / "run", "mf", net=UNEVEN, batch_size=ROWS, micro_batch=16, epochs=1, schedule="sequence")
    modules, heads = first_weights("mf", "pixels", net=UNEVEN)
    a = data("pixels").x
    for index, (module, head) in enumerate(zip(modules, heads, strict=True)):
        a = module(a)
        expected = cross_entropy(nn.functional.linear(a, head.weight), data("pixels").y).item()
        assert found[index] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("net", ["mlp:24x6", "mlp:24,24,9,24,24,24"])
@pytest.mark.parametrize("method", ["mf", "lbp-ae"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deep_nets_whose_latent_files_are_reused_stream_the_same_bits(tmp_path, method, schedule, net):
    found = []
    for placement in ("stream", "resident"):
        (tmp_path / placement).mkdir()
        values = {"net": net, "schedule": schedule, "placement": placement, "epochs": 3}
        found.append(trained(tmp_path / placement, method, **values))
    assert_same(*found)
