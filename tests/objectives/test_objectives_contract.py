"""One contract for every rule and baseline, and toy rules that have what later ones will need.

The toys (several streams, several phases) run through ``fit`` as it is: the machine knows no rule.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference.batches import as_they_lie, shuffled
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import avg_pool2d, conv2d, one_hot, softplus
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from edgetrain import objectives
from edgetrain.baselines import BASELINES
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.keys import seeded
from edgetrain.memory.meter import meter_of
from edgetrain.nets.spec import open_net
from edgetrain.objectives import OBJECTIVES
from edgetrain.objectives.base import Batch, Defaults, Objective, Phase, Step, nodes
from edgetrain.planning import planner
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import LiveCell, OptimizerRecipe
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.executor import Executor, Tally
from edgetrain.stream.feed import DeviceFeed, Slice
from edgetrain.stream.latents import DeviceLatents
from edgetrain.training import job
from edgetrain.training.fit import fit
from edgetrain.training.watcher import Silent

ALL = {**OBJECTIVES, **BASELINES}
CLASSES, ROWS, BATCH, SEED, LR = 3, 38, 16, 4, 3e-3
NET, SHAPE = "mlp:7,5", (6,)
CPU = torch.device("cpu")
TINY = 1e-12


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chain(name, net=NET, shape=SHAPE):
    """A rule and the nodes of a net under it."""
    recipes = open_net(net, shape, ALL[name].net_defaults)
    objective = ALL[name](CLASSES, recipes.options)
    return objective, nodes(objective.join(list(recipes.cells)), shape, SEED)


def cells_of(name, net=NET, shape=SHAPE):
    """(rule, cell, head, an input [B, ...]) of each node, in float64; inputs are not negative."""
    objective, found = chain(name, net, shape)
    draw = torch.Generator().manual_seed(7)
    for node in found:
        with seeded(SEED, "head", node.index):
            head = objective.head(node)
        x = torch.rand(ROWS, *node.parent.shape, generator=draw, dtype=torch.float64)
        yield objective, node.recipe.materialise(SEED, node.index).double(), head.double(), x


def labels(rows=ROWS):
    return torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(8))


def shown(x, y, first=0, last=ROWS):
    """Rows of a step's batch, as the machine shows them."""
    draws = StepDraws(SEED, 0, 0, 0, len(x))
    draws.first = first
    return Batch({"x": x[first:last]}, y[first:last], draws)


def named(cell, head):
    return {
        **{f"cell.{name}": value.detach() for name, value in cell.named_parameters()},
        **{f"head.{name}": value.detach() for name, value in head.named_parameters()},
    }


# -- the formulas, written again -----------------------------------------------------------------------


def negative_log_likelihood(logits, y):
    likelihood = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -sum(torch.log(likelihood[row, label]) for row, label in enumerate(y.tolist()))


def mono_forward(p, x, y):
    a = (x @ p["cell.linear.weight"].T).clamp(min=0)
    return negative_log_likelihood(a @ p["head.weight"].T, y)


def autoencoder(p, seen, x):
    mean, variance = seen.mean(1, keepdim=True), seen.var(1, correction=0, keepdim=True)
    u = (seen - mean) / (variance + 1e-5).sqrt()
    z = (u @ p["cell.linear.weight"].T + p["cell.linear.bias"]).clamp(min=0)
    r = (z @ p["head.0.weight"].T + p["head.0.bias"]).clamp(min=0)
    return sum(((r[row] - x[row]) ** 2).mean() for row in range(len(x)))


def denoising(p, x, y):
    return autoencoder(p, x + 0.2 * StepDraws(SEED, 0, 0, 0, len(x)).normal("noise", x), x)


def backpropagation(p, x, y):
    """The options of ``bp`` without ``like`` are the standard ones: with biases."""
    for index in range(2):
        x = (x @ p[f"cell.{index}.linear.weight"].T + p[f"cell.{index}.linear.bias"]).clamp(min=0)
    return negative_log_likelihood(x @ p["head.weight"].T + p["head.bias"], y)


FORMULAS = {
    "mf": mono_forward,
    "lbp-ae": lambda p, x, y: autoencoder(p, x, x),
    "lbp-dae": denoising,
    "bp": backpropagation,
}


def test_every_rule_has_its_formula_here():
    assert sorted(FORMULAS) == sorted(ALL)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_formula_summed_over_the_samples(name):
    y = labels()
    for objective, cell, head, x in cells_of(name):
        loss = objective.loss(objective.phases[0].name, cell, head, shown(x, y)).loss
        expected = FORMULAS[name](named(cell, head), x, y)
        torch.testing.assert_close(loss.detach(), expected, rtol=TINY, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_losses_of_micro_batches_add_up_to_that_of_the_batch(name):
    y = labels()
    for objective, cell, head, x in cells_of(name):
        for phase in objective.phases:
            whole = objective.loss(phase.name, cell, head, shown(x, y)).loss
            cuts = [objective.loss(phase.name, cell, head, shown(x, y, *cut)).loss for cut in ((0, 5), (5, ROWS))]
            torch.testing.assert_close(sum(cuts).detach(), whole.detach(), rtol=TINY, atol=0)


def test_gradients_of_mono_forward_are_those_worked_out_by_hand():
    y = labels()
    for objective, cell, head, x in cells_of("mf"):
        (objective.loss("step", cell, head, shown(x, y)).loss / ROWS).backward()
        w, m = cell.linear.weight.detach(), head.weight.detach()
        z = x @ w.T
        a = z.clamp(min=0)
        d = (torch.softmax(a @ m.T, 1) - one_hot(y, CLASSES)) / ROWS
        dz = (d @ m) * (z > 0)
        torch.testing.assert_close(head.weight.grad, d.T @ a, rtol=0, atol=TINY)
        torch.testing.assert_close(cell.linear.weight.grad, dz.T @ x, rtol=0, atol=TINY)
        assert cell.linear.weight.grad.abs().max() > 1e-4


def test_the_projection_of_a_convolutional_cell_reads_the_flattened_pooled_map():
    y = labels()
    for objective, cell, head, x in cells_of("mf", "cnn:4,5", (2, 9, 8)):
        pooled = avg_pool2d(conv2d(x, cell.conv.weight, padding=1).clamp(min=0), 2)
        logits = pooled.reshape(ROWS, -1) @ head.weight.T
        loss = objective.loss("step", cell, head, shown(x, y)).loss
        torch.testing.assert_close(loss, negative_log_likelihood(logits, y), rtol=TINY, atol=0)


# -- nothing flows back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_what_a_step_hands_out_carries_no_gradient_even_where_its_input_does(name):
    y = labels()
    for objective, cell, head, x in cells_of(name):
        before = nn.Linear(x.shape[1], x.shape[1]).double()  # stands for the cell before
        attached = before(x).relu()
        step = objective.loss(objective.phases[0].name, cell, head, shown(attached, y))
        assert step.loss.requires_grad
        handed = [*(step.emitted or {}).values(), *([] if step.scores is None else [step.scores])]
        assert not any(value.requires_grad for value in handed)


@pytest.mark.parametrize("name", ALL)
def test_what_a_step_emits_and_scores_is_what_the_cell_makes_of_clean_inputs(name):
    y = labels()
    for objective, cell, head, x in cells_of(name):
        step = objective.loss(objective.phases[0].name, cell, head, shown(x, y))
        with torch.no_grad():
            latents = objective.latent(cell, {"x": x})
            scores = objective.score(head, latents)
        assert step.emitted is None or torch.equal(step.emitted["x"], latents["x"])
        assert step.scores is None or torch.equal(step.scores, scores)


def given(name, **values):
    standard = {"net": NET, "epochs": 2, "batch_size": BATCH, "micro_batch": BATCH, "seed": SEED, "threads": 1}
    return Settings().with_values({"method": name, **standard, "lr": LR, "device": "cpu", **values})


def toy(rows=ROWS, width=6):
    """Pixels that lie around one centre per class."""
    draw = np.random.default_rng(9)
    y = np.arange(rows) % CLASSES
    centres = draw.integers(60, 190, (CLASSES, width))
    return (centres[y] + draw.integers(-50, 50, (rows, width))).astype(np.uint8), y


@pytest.mark.parametrize("placement", ["stream", "resident"])
@pytest.mark.parametrize("name", ALL)
def test_the_machine_shows_a_rule_inputs_that_have_no_history(tmp_path, monkeypatch, name, placement):
    loss, seen = ALL[name].loss, []

    def looks(self, phase, cell, head, batch):
        seen.append(any(value.requires_grad or value.grad_fn for value in batch.streams.values()))
        assert torch.is_grad_enabled()
        return loss(self, phase, cell, head, batch)

    monkeypatch.setattr(ALL[name], "loss", looks)
    schedule = {} if name in BASELINES else {"schedule": "sequence"}
    fit(given(name, placement=placement, **schedule), tmp_path / "run", data=from_arrays(toy()))
    assert seen
    assert not any(seen)


# -- learning and coming back --------------------------------------------------------------------------


class Losses(Silent):
    """Keeps the training losses of each node."""

    def __init__(self):
        self.found = {}

    def visited(self, progress):
        self.found.setdefault(progress.node, []).append(progress.loss)


@pytest.mark.parametrize("name", ALL)
def test_the_loss_of_every_cell_falls_on_a_toy(tmp_path, name):
    watcher, settings = Losses(), given(name, epochs=6, lr=1e-2, net="mlp:12x2")
    run = fit(settings, tmp_path / "run", data=from_arrays(toy(150), toy(60)), watcher=watcher)
    assert len(watcher.found) == len(run.nodes) + (ALL[name].vote == "trained")
    assert all(found[-1] < 0.9 * found[0] for found in watcher.found.values())
    assert run.record.test_accuracy > 0.6  # 1 / 3 by chance


@pytest.mark.parametrize("name", ALL)
def test_a_cell_that_left_the_device_goes_on_as_if_it_had_stayed(name):
    objective, found = chain(name)
    node, recipe = found[-1], OptimizerRecipe("adamw", LR, 1e-2)
    latents = DeviceLatents(ROWS, "float32", False)
    latents.put(0, {"x": torch.rand(ROWS, *node.parent.shape, generator=torch.Generator().manual_seed(1))})
    order, executor = np.random.default_rng(2).permutation(ROWS), Executor(objective, CPU, meter_of(CPU, False), SEED)

    def steps(cell, first, last):
        work = Slice(ROWS, BATCH, BATCH, first, last, order, len(objective.phases))
        executor.train(cell, DeviceFeed(latents, labels()), work, 0, Tally(CPU))
        return {key: value.clone() for key, value in cell.state().items()}

    stayed = steps(LiveCell(node, objective, recipe, CPU), 0, 3)
    left = steps(LiveCell(node, objective, recipe, CPU), 0, 2)
    returned = steps(LiveCell(node, objective, recipe, CPU, left), 2, 3)
    assert sorted(returned) == sorted(stayed)
    assert all(torch.equal(returned[key], stayed[key]) for key in stayed)
    bare = {key: value for key, value in left.items() if not key.startswith("optim.")}
    forgetful = steps(LiveCell(node, objective, recipe, CPU, bare), 2, 3)
    assert any(not torch.equal(forgetful[key], stayed[key]) for key in bare)


# -- toys: what later rules need -----------------------------------------------------------------------


def register(monkeypatch, kind):
    monkeypatch.setitem(objectives.OBJECTIVES, kind.name, kind)
    monkeypatch.setitem(job.METHODS, kind.name, kind)


def peaks_unknown(monkeypatch):
    monkeypatch.setattr(planner, "cell_peak", lambda work, index, size: 0)
    monkeypatch.setattr(planner, "resident_peak", lambda work, sizes: (0, [0] * len(sizes)))


def trained(path, name, **values):
    """Final tensors of a run on the toy data, by unit and name."""
    folder = RunFolder(fit(given(name, **values), path / "run", data=from_arrays(toy())).path)
    files = folder.files()
    return {f"{unit}/{key}": value for unit in files for key, value in folder.read_unit(files[unit]).items()}


def learned(unit, optimizer, parameters, phase):
    """A reference's parameters and their optimizer state under the names of a run's files."""
    values = {f"{unit}/{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, moment in optimizer.state[value].items():
            values[f"{unit}/optim.{phase}.{name}.{key}"] = moment
    return values


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def toy_tensors():
    x, y = toy()
    return torch.from_numpy(x).float() / 255, torch.from_numpy(y)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=LR, fused=True)


EVERY_WAY = pytest.mark.parametrize(
    ("schedule", "placement"),
    [(schedule, placement) for schedule in ("separate", "sequence") for placement in ("stream", "resident")],
)


def stamped(x, y):
    """Inputs with the one-hot label in their first places."""
    return torch.cat([one_hot(y, CLASSES).to(x.dtype), x[:, CLASSES:]], 1)


def of_length_one(a):
    return a / (a.square().sum(1, keepdim=True).sqrt() + 1e-4)


class TwoStreams(Objective):
    """Forward-forward in small: right and wrong labels, a goodness, a normalised hand-over."""

    name = "toy-streams"
    citation = needs = ""
    stream_names = ("pos", "neg")
    defaults = Defaults(schedule="separate", optimizer="adam", lr=LR)
    vote = "sum"

    def streams(self, x, y, draws):
        return {"pos": stamped(x, y), "neg": stamped(x, (y + 1) % self.classes)}

    def loss(self, phase, cell, head, batch):
        a = {stream: cell(values) for stream, values in batch.streams.items()}
        good, bad = a["pos"].square().mean(1), a["neg"].square().mean(1)
        emitted = {stream: of_length_one(values.detach()) for stream, values in a.items()}
        return Step(softplus(2 - good).sum() + softplus(bad - 2).sum(), emitted)

    def latent(self, cell, streams):
        return {stream: of_length_one(cell(values)) for stream, values in streams.items()}


def two_streams_reference(schedule, epochs=2):
    recipes = open_net(NET, SHAPE, {}).cells
    layers = [recipe.materialise(SEED, index).linear for index, recipe in enumerate(recipes)]
    optimizers = [adam(layer.parameters()) for layer in layers]

    def step(index, pos, neg):
        a, b = layers[index](pos).relu(), layers[index](neg).relu()
        loss = softplus(2 - a.square().mean(1)).sum() + softplus(b.square().mean(1) - 2).sum()
        optimizers[index].zero_grad()
        (loss / len(pos)).backward()
        optimizers[index].step()
        return of_length_one(a.detach()), of_length_one(b.detach())

    x, y = toy_tensors()
    pos, neg = stamped(x, y), stamped(x, (y + 1) % CLASSES)
    if schedule == "sequence":
        for epoch in range(epochs):
            for batch in shuffled(SEED, epoch, ROWS, BATCH):
                a = pos[batch], neg[batch]
                for index in range(len(layers)):
                    a = step(index, *a)
    else:
        for index, layer in enumerate(layers):
            for epoch in range(epochs):
                for batch in shuffled(SEED, epoch, ROWS, BATCH):
                    step(index, pos[batch], neg[batch])
            with torch.no_grad():
                pos, neg = (
                    torch.cat([of_length_one(layer(rows[batch]).relu()) for batch in as_they_lie(ROWS, BATCH)])
                    for rows in (pos, neg)
                )
    found = {}
    for index, layer in enumerate(layers):
        parameters = {f"cell.linear.{leaf}": value for leaf, value in layer.named_parameters()}
        found |= learned(f"{index:03}", optimizers[index], parameters, "step")
    return found


@EVERY_WAY
def test_a_rule_with_two_streams_and_a_normalised_hand_over_is_the_plain_loop(
    tmp_path, monkeypatch, schedule, placement
):
    register(monkeypatch, TwoStreams)
    peaks_unknown(monkeypatch)
    found = trained(tmp_path, "toy-streams", schedule=schedule, placement=placement)
    assert_same(found, two_streams_reference(schedule))


def test_a_rule_with_two_streams_can_be_planned(tmp_path, monkeypatch):
    register(monkeypatch, TwoStreams)
    run = fit(given("toy-streams", placement="stream"), tmp_path / "run", data=from_arrays(toy()))
    assert run.record.predicted_peak_mb >= run.record.peak_gpu_mb


class TwoPhases(Objective):
    """A GAN in small: the discriminator's step, then the generator's against the new discriminator."""

    name = "toy-phases"
    citation = needs = ""
    defaults = Defaults(schedule="separate", optimizer="adam", lr=LR)
    vote = "sum"
    phases = (
        Phase("d", lambda name: name.startswith("head.d")),
        Phase("g", lambda name: not name.startswith("head.d")),
    )

    def head(self, node):
        inputs = node.parent.shape[0]
        return nn.ModuleDict({"d": nn.Linear(inputs, 1), "g": nn.Linear(node.shape[0], inputs)})

    def loss(self, phase, cell, head, batch):
        x = batch.streams["x"]
        z = cell(x)
        made = head["g"](z)
        emitted = {"x": z.detach()}  # in every phase; the machine takes the first one's
        if phase == "g":
            return Step(fooled(head["d"](made)), emitted)
        return Step(told_apart(head["d"](x), head["d"](made.detach())), emitted)


class MakerFirst(TwoPhases):
    """The first phase changes what the cell hands on."""

    name = "toy-phases-reversed"
    phases = TwoPhases.phases[::-1]


def told_apart(real, made):
    wanted = torch.ones_like(real), torch.zeros_like(made)
    return bce(real, wanted[0], reduction="sum") + bce(made, wanted[1], reduction="sum")


def fooled(made):
    return bce(made, torch.ones_like(made), reduction="sum")


def two_phases_reference(schedule, micro_batch, phases="dg", epochs=2):
    recipes = open_net(NET, SHAPE, {}).cells
    cells = []
    for index, recipe in enumerate(recipes):
        layer = recipe.materialise(SEED, index).linear
        with seeded(SEED, "head", index):
            judge, maker = nn.Linear(recipe.in_shape[0], 1), nn.Linear(recipe.out_shape[0], recipe.in_shape[0])
        own = [*layer.parameters(), *maker.parameters()]
        cells.append((layer, judge, maker, adam(judge.parameters()), adam(own)))

    def step(index, x):
        layer, judge, maker, of_judge, of_maker = cells[index]
        emitted = torch.cat([layer(part).relu().detach() for part in x.split(micro_batch)])
        for phase in phases:
            optimizer = of_judge if phase == "d" else of_maker
            optimizer.zero_grad()
            for part in x.split(micro_batch):
                made = maker(layer(part).relu())
                loss = fooled(judge(made)) if phase == "g" else told_apart(judge(part), judge(made.detach()))
                (loss / len(x)).backward()
            optimizer.step()
        return emitted

    x, _ = toy_tensors()
    if schedule == "sequence":
        for epoch in range(epochs):
            for batch in shuffled(SEED, epoch, ROWS, BATCH):
                z = x[batch]
                for index in range(len(cells)):
                    z = step(index, z)
    else:
        for index, (layer, *_) in enumerate(cells):
            for epoch in range(epochs):
                for batch in shuffled(SEED, epoch, ROWS, BATCH):
                    step(index, x[batch])
            with torch.no_grad():
                cut = [part for batch in as_they_lie(ROWS, BATCH) for part in batch.split(micro_batch)]
                x = torch.cat([layer(x[part]).relu() for part in cut])
    found = {}
    for index, (layer, judge, maker, of_judge, of_maker) in enumerate(cells):
        unit = f"{index:03}"
        found |= learned(unit, of_judge, {f"head.d.{leaf}": value for leaf, value in judge.named_parameters()}, "d")
        own = {f"cell.linear.{leaf}": value for leaf, value in layer.named_parameters()}
        own |= {f"head.g.{leaf}": value for leaf, value in maker.named_parameters()}
        found |= learned(unit, of_maker, own, "g")
    return found


@EVERY_WAY
@pytest.mark.parametrize("micro_batch", [BATCH, 8])
def test_a_rule_with_two_phases_is_the_plain_loop_with_two_optimizers(
    tmp_path, monkeypatch, schedule, placement, micro_batch
):
    register(monkeypatch, TwoPhases)
    found = trained(tmp_path, "toy-phases", schedule=schedule, placement=placement, micro_batch=micro_batch)
    assert_same(found, two_phases_reference(schedule, micro_batch))


def test_latents_are_those_from_before_the_first_of_two_phases(tmp_path, monkeypatch):
    register(monkeypatch, MakerFirst)
    found = trained(tmp_path, "toy-phases-reversed", schedule="sequence", micro_batch=8)
    assert_same(found, two_phases_reference("sequence", 8, "gd"))


@pytest.mark.parametrize("placement", ["stream", "resident"])
def test_a_phase_changes_its_own_parameters_only_and_finds_no_gradients_left(tmp_path, monkeypatch, placement):
    register(monkeypatch, TwoPhases)
    loss, seen, left = TwoPhases.loss, [], []

    def looks(self, phase, cell, head, batch):
        if not isinstance(batch.y, FakeTensor):
            seen.append((phase, {name: value.clone() for name, value in named(cell, head).items()}))
            left.extend(value.grad for part in (cell, head) for value in part.parameters())
        return loss(self, phase, cell, head, batch)

    monkeypatch.setattr(TwoPhases, "loss", looks)
    trained(tmp_path, "toy-phases", net="mlp:7", placement=placement)
    assert [phase for phase, _ in seen] == ["d", "g"] * (2 * 3)  # two epochs of three steps
    for (phase, before), (_, after) in pairwise(seen):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        judge = {"head.d.weight", "head.d.bias"}
        assert changed == (judge if phase == "d" else set(before) - judge)
    assert all(gradient is None for gradient in left)
