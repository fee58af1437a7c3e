"""One contract for every rule and baseline, and toy rules that have what later ones will need.

The toys (several streams, several phases) run through ``fit`` as it is: the machine knows no rule.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from machine import flat, reader_of, state_of, train_steps
from machine import named as units_named
from reference.batches import as_they_lie, shuffled
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import avg_pool2d, conv2d, one_hot, softplus
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from edgetrain.baselines import BASELINES
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.errors import InputError
from edgetrain.keys import seeded
from edgetrain.nets.spec import open_net
from edgetrain.objectives import OBJECTIVES
from edgetrain.objectives.base import Batch, Defaults, Node, Objective, Phase, Step, nodes
from edgetrain.planning import planner
from edgetrain.planning.dryrun import Peak
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import ResidentCell, Setup
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.inputs import training_inputs
from edgetrain.stream.latents import DeviceLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.span import Span
from edgetrain.training import job
from edgetrain.training.callbacks import Callback
from edgetrain.training.fit import fit
from edgetrain.training.methods import METHODS

ALL = {**OBJECTIVES, **BASELINES}
CLASSES, ROWS, BATCH, SEED, LR = 3, 38, 16, 4, 3e-3
NET, SHAPE = "mlp:7,5", (6,)
#: Net and sample of the rules that NET and SHAPE do not suit; one side of the images is odd.
SUITED = {
    "lbp-cae": ("cnn:4,5", (2, 5, 4)),
    "sll+": ("vit:depth=2,width=8,heads=2,patch=2", (1, 4, 6)),
}
#: Every rule, and once more with the classifier of those that can do without one.
CASES = [(name, kind.vote == "classifier") for name, kind in ALL.items()]
CASES += [(name, True) for name, kind in ALL.items() if kind.classifier and kind.vote != "classifier"]
EVERY_CASE = pytest.mark.parametrize(
    ("name", "trained"), CASES, ids=[name + (", classifier" if trained else "") for name, trained in CASES]
)
CPU = torch.device("cpu")
TINY = 1e-12


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peaks_unknown(monkeypatch):
    monkeypatch.setattr(planner, "cell_peak", lambda work, *how: Peak(0))
    monkeypatch.setattr(planner, "resident_peak", lambda work, sizes: (0, [0] * len(sizes)))


def suited(name):
    return SUITED.get(name, (NET, SHAPE))


def chain(name, trained=False, net=None, shape=None, **constants):
    """A rule and the nodes of a net under it."""
    net, shape = net or suited(name)[0], shape or suited(name)[1]
    recipes = open_net(net, shape, ALL[name].net_defaults)
    objective = ALL[name](CLASSES, recipes.options, constants, trains_classifier=trained)
    found = nodes(objective.join(list(recipes.cells)), shape, SEED)
    objective.check(found)
    return objective, found


def labels(rows=ROWS):
    return torch.randint(0, CLASSES, (rows,), generator=torch.Generator().manual_seed(8))


@dataclass
class Learner:
    """One cell of a rule in float64, with a batch of what it reads; inputs are not negative."""

    objective: Objective
    node: Node
    cell: nn.Module
    head: Any
    read: dict[str, torch.Tensor]  # of the first cell the inputs as ``x``, of others their streams
    y: torch.Tensor

    def shown(self, first=0, last=ROWS, read=None, epoch=0):
        """Rows of a step's batch, as the machine shows them."""
        draws = StepDraws(SEED, 0, epoch, 0, np.arange(ROWS)).of(first)
        rows = {name: values[first:last] for name, values in (read or self.read).items()}
        if self.node.index == 0:
            rows = self.objective.streams(rows["x"], self.y[first:last], draws)
        return Batch(rows, self.y[first:last], draws)

    def loss(self, phase=None, **how):
        return self.objective.loss(phase or self.objective.phases[0].name, self.cell, self.head, self.shown(**how))

    @property
    def values(self):
        """Weights and fixed matrices by name."""
        found = {f"cell.{name}": value.detach() for name, value in _tensors(self.cell)}
        return found | {f"head.{name}": value.detach() for name, value in _tensors(self.head)}


def _tensors(module):
    return [] if module is None else [*module.named_parameters(), *module.named_buffers()]


def learners(name, trained=False, net=None, shape=None, **constants):
    """Each cell of a rule that has a loss of its own."""
    objective, found = chain(name, trained, net, shape, **constants)
    draw = torch.Generator().manual_seed(7)
    for node in found:
        if objective.streams_layers and not node.is_last:
            continue  # its loss is the gradient from the layer after it
        with seeded(SEED, "head", node.index):
            head = objective.head(node)
        cell = node.recipe.materialise(SEED, node.index).double()
        names = objective.stream_names if node.index else ("x",)
        read = {
            name: torch.rand(ROWS, *node.parent.shape, generator=draw, dtype=torch.float64) for name in sorted(names)
        }
        yield Learner(objective, node, cell, None if head is None else head.double(), read, labels())


def named(cell, head):
    return {
        **{f"cell.{name}": value.detach() for name, value in cell.named_parameters()},
        **{f"head.{name}": value.detach() for name, value in head.named_parameters()},
    }


# -- the formulas, written again -----------------------------------------------------------------------

# Each takes the tensors of cell and head by name, the streams that the cell reads, the labels, and the learner.


def negative_log_likelihood(logits, y):
    likelihood = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -sum(torch.log(likelihood[row, label]) for row, label in enumerate(y.tolist()))


def dense(p, name, x):
    z = x.flatten(1) @ p[f"{name}.weight"].T
    return z + p[f"{name}.bias"] if f"{name}.bias" in p else z


def normalised(x):
    """Each sample by its own mean and variance."""
    over = tuple(range(1, x.ndim))
    mean, variance = x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def mean_squares(made, x):
    return sum(((made[row] - x[row]) ** 2).mean() for row in range(len(x)))


def noise(like):
    return StepDraws(SEED, 0, 0, 0, np.arange(ROWS)).normal("noise", like)


def mono_forward(p, s, y, of):
    a = dense(p, "cell.linear", s["x"]).clamp(min=0)
    return negative_log_likelihood(a @ p["head.weight"].T, y)


def reconstructed(p, seen, decoder="head.0"):
    z = dense(p, "cell.linear", normalised(seen)).clamp(min=0)
    return dense(p, decoder, z).clamp(min=0)


def autoencoder(p, s, y, of):
    return mean_squares(reconstructed(p, s["x"]), s["x"])


def denoising(p, s, y, of):
    return mean_squares(reconstructed(p, s["x"] + 0.2 * noise(s["x"])), s["x"])


def convolutional(p, s, y, of):
    """The transposed convolution laid down pixel by pixel."""
    x, v = s["x"], p["head.0.weight"]
    a = conv2d(normalised(x), p["cell.conv.weight"], p["cell.conv.bias"], padding=1).clamp(min=0)
    z = a.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    made = p["head.0.bias"].view(1, -1, 1, 1).repeat(len(x), 1, *x.shape[2:])
    down, right = (1 if side % 2 else 2 for side in x.shape[2:])
    for i, j in product(range(z.shape[2]), range(z.shape[3])):
        spread = torch.einsum("bn,nchw->bchw", z[:, :, i, j], v)
        made[:, :, i * down : i * down + v.shape[2], j * right : j * right + v.shape[3]] += spread
    return mean_squares(made.clamp(min=0), x)


def believed(p, x):
    """The discriminator's belief that rows are real, [B]."""
    hidden = dense(p, "head.discriminator.0", x).clamp(min=0)
    return 1 / (1 + torch.exp(-dense(p, "head.discriminator.2", hidden)[:, 0]))


def made_up(p, s):
    return reconstructed(p, noise(s["x"]), "head.decoder.0")


def discriminator(p, s, y, of):
    return -torch.log(believed(p, s["x"])).sum() - torch.log(1 - believed(p, made_up(p, s))).sum()


def generator(p, s, y, of):
    return -torch.log(believed(p, made_up(p, s))).sum()


def log1pexp(x):
    return torch.log(1 + torch.exp(x))


def goodnesses(p, s, of):
    """Mean squared activities for right and wrong labels; later cells read directions only."""
    for name in ("pos", "neg"):
        x = s[name].flatten(1)
        if of.node.index:
            x = x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
        yield dense(p, "cell.linear", x).clamp(min=0).square().mean(1)


def forward_forward(p, s, y, of):
    good, bad = goodnesses(p, s, of)
    return (log1pexp(2 - good) + log1pexp(bad - 2)).sum() / 2


def symba(p, s, y, of):
    good, bad = goodnesses(p, s, of)
    return log1pexp(-4 * (good - bad)).sum()


def layerwise(a, x, p, y):
    """Cross-entropy, and the Bhattacharyya distance of the parent's distribution and the cell's own."""
    v, w = a @ p["head.own"], torch.softmax(x.flatten(1) @ p["head.parent"], 1)
    return negative_log_likelihood(v, y) - torch.log((w * torch.softmax(v, 1)).sqrt().sum(1)).sum()


def stochastic(p, s, y, of):
    return layerwise(dense(p, "cell.linear", s["x"]).clamp(min=0), s["x"], p, y)


def stochastic_blocks(p, s, y, of):
    """The class token of what the blocks make (tests/nets holds their formula)."""
    x = s["x"]
    return layerwise(of.cell(x).detach()[:, 0], x[:, 0] if of.node.index else x, p, y)


def similarities(rows):
    """Cosines of all pairs of mean-centred rows."""
    centred = [row - row.mean() for row in rows.flatten(1)]
    unit = [row / (1e-8 + (row * row).sum().sqrt()) for row in centred]
    return torch.stack([torch.stack([(one * other).sum().clamp(-1, 1) for other in unit]) for one in unit])


def prediction_and_similarity(p, s, y, of):
    z = dense(p, "cell.linear", s["x"])
    z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() * p["cell.norm.weight"] + p["cell.norm.bias"]
    h = torch.where(z > 0, z, 0.01 * z)
    unlike = similarities(h @ p["head.similarity.weight"].T) - similarities(torch.eye(CLASSES, dtype=h.dtype)[y])
    predicted = negative_log_likelihood(dense(p, "head.predict", h), y)
    return 0.01 * predicted + 0.99 * len(y) * unlike.square().mean()


def last_layers(p, x):
    """The options of ``bp`` without ``like`` are the standard ones: with biases."""
    for index in range(2):
        x = dense(p, f"cell.{index}.linear", x).clamp(min=0)
    return x


def backpropagation(p, s, y, of):
    return negative_log_likelihood(dense(p, "head", last_layers(p, s["x"])), y)


def last_layer(p, s, y, of):
    return negative_log_likelihood(dense(p, "head", dense(p, "cell.linear", s["x"]).clamp(min=0)), y)


def direct_feedback(p, s, y, of):
    return negative_log_likelihood(dense(p, "head.classifier", last_layers(p, s["x"])), y)


def single_layer(p, s, y, of):
    return negative_log_likelihood(dense(p, "head", s["x"]), y)


#: By rule, and there by phase.
FORMULAS = {
    "mf": {"step": mono_forward},
    "lbp-ae": {"step": autoencoder},
    "lbp-dae": {"step": denoising},
    "lbp-cae": {"step": convolutional},
    "lbp-gan": {"discriminator": discriminator, "generator": generator},
    "ff": {"step": forward_forward},
    "symba": {"step": symba},
    "sll": {"step": stochastic},
    "sll+": {"step": stochastic_blocks},
    "predsim": {"step": prediction_and_similarity},
    "slp": {"step": single_layer},
    "bp": {"step": backpropagation},
    "bp-checkpoint": {"step": backpropagation},
    "bp-offload": {"step": backpropagation},
    "bp-stream": {"step": last_layer},
    "fa": {"step": backpropagation},
    "dfa": {"step": direct_feedback},
}
#: Rules in which samples of a batch influence each other.
COUPLING = ("predsim",)


def test_every_phase_of_every_rule_has_its_formula_here():
    assert {name: list(phases) for name, phases in FORMULAS.items()} == {
        name: [phase.name for phase in kind.phases] for name, kind in ALL.items()
    }


@EVERY_CASE
def test_the_loss_is_the_formula_summed_over_the_samples(name, trained):
    for learner in learners(name, trained):
        for phase, formula in FORMULAS[name].items():
            expected = formula(learner.values, learner.shown().streams, learner.y, learner)
            found = learner.loss(phase).loss
            assert found.ndim == 0
            torch.testing.assert_close(found.detach(), expected, rtol=TINY, atol=0)


def cut_up(learner, phase):
    return sum(learner.loss(phase, first=first, last=last).loss.detach() for first, last in ((0, 5), (5, ROWS)))


@EVERY_CASE
def test_losses_of_micro_batches_add_up_to_that_of_the_batch_unless_samples_are_compared(name, trained):
    assert ALL[name].couples_batch == (name in COUPLING)
    for learner in learners(name, trained):
        for phase in FORMULAS[name]:
            whole, parts = learner.loss(phase).loss.detach(), cut_up(learner, phase)
            if name in COUPLING:
                assert abs(parts / whole - 1) > 1e-3
            else:
                torch.testing.assert_close(parts, whole, rtol=TINY, atol=0)


@pytest.mark.parametrize("name", COUPLING)
def test_samples_that_are_compared_with_each_other_are_compared_without_normalisation_too(name):
    for learner in learners(name, net=f"{NET};norm=none"):
        assert abs(cut_up(learner, "step") / learner.loss().loss.detach() - 1) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_the_planner_splits_batches_unless_samples_are_compared(name, monkeypatch):
    peaks_unknown(monkeypatch)
    opened = job.open_job(given(name, micro_batch=4), data=data_for(name))
    if name in COUPLING:
        with pytest.raises(InputError, match="--micro-batch 4: the samples of a batch influence each other"):
            job.plan_job(opened)
    else:
        assert set(job.plan_job(opened).micro_batches) == {4}
    assert set(job.plan_job(job.open_job(given(name), data=data_for(name))).micro_batches) == {BATCH}


# -- constants -----------------------------------------------------------------------------------------


def close(found, expected):
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=TINY, atol=0)


def test_every_constant_has_its_test_here():
    assert {name: set(kind.constants) for name, kind in ALL.items() if kind.constants} == {
        "lbp-dae": {"noise"},
        "ff": {"threshold"},
        "symba": {"alpha"},
        "sll": {"beta", "dropout"},
        "sll+": {"beta", "dropout"},
        "predsim": {"beta"},
    }


def test_without_noise_a_denoising_cell_is_an_autoencoder():
    for learner in learners("lbp-dae", noise=0.0):
        close(learner.loss().loss, autoencoder(learner.values, learner.shown().streams, learner.y, learner))


def test_threshold_and_alpha_of_goodness():
    for learner in learners("ff", threshold=1.5):
        good, bad = goodnesses(learner.values, learner.shown().streams, learner)
        close(learner.loss().loss, (log1pexp(1.5 - good) + log1pexp(bad - 1.5)).sum() / 2)
    for learner in learners("symba", alpha=0.5):
        good, bad = goodnesses(learner.values, learner.shown().streams, learner)
        close(learner.loss().loss, log1pexp((bad - good) / 2).sum())


@pytest.mark.parametrize("name", ["sll", "sll+"])
def test_beta_weighs_the_distance_from_the_parent(name):
    for none, half, one in zip(*(learners(name, beta=beta) for beta in (0.0, 0.5, 1.0)), strict=True):
        close(half.loss().loss, (none.loss().loss + one.loss().loss) / 2)
        assert one.loss().loss > none.loss().loss  # a distance is positive


def test_beta_weighs_similarity_against_prediction():
    for none, half, one in zip(*(learners("predsim", beta=beta) for beta in (0.0, 0.5, 1.0)), strict=True):
        close(half.loss().loss, (none.loss().loss + one.loss().loss) / 2)


def test_dropped_entries_of_a_projection_are_the_same_for_the_whole_step():
    for learner in learners("sll", dropout=0.3):
        batch, own = learner.shown(), learner.values["head.own"]
        mask = batch.draws.keep("mask", own, 0.7)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        p = {**learner.values, "head.own": own * mask / 0.7}
        close(learner.loss().loss, stochastic(p, batch.streams, learner.y, learner))
        close(cut_up(learner, "step"), learner.loss().loss)
        assert learner.loss(epoch=1).loss != learner.loss().loss


# -- streams -------------------------------------------------------------------------------------------


@EVERY_CASE
def test_streams_have_their_names_and_leave_the_inputs_as_they_are(name, trained):
    objective, _ = chain(name, trained)
    first = next(learners(name, trained))
    x = first.read["x"].clone()
    streams, unlabelled = first.shown().streams, objective.unlabelled_streams(first.read["x"])
    assert tuple(streams) == objective.stream_names
    assert tuple(unlabelled) == objective.unlabelled_names
    assert all(values.shape == x.shape for values in (*streams.values(), *unlabelled.values()))
    latents = objective.latent(first.cell, streams)
    read, _ = objective.read(first.cell, first.head, unlabelled)
    assert set(latents) == set(objective.stream_names)
    assert set(read) == set(objective.unlabelled_names)
    assert {values.shape[1:] for values in (*latents.values(), *read.values())} == {first.node.shape}
    first.loss()
    assert torch.equal(first.read["x"], x)


@EVERY_CASE
def test_a_classifier_reads_a_stream_that_is_there_in_training_and_afterwards(name, trained):
    objective, found = chain(name, trained)
    reads = objective.read_by_classifier(len(found))
    assert reads == (
        () if not trained else tuple(range(len(found)))[slice(0 if objective.classifier == "all" else -1, None)]
    )
    if trained:
        assert objective.classifier_stream in objective.stream_names
        assert objective.classifier_stream in objective.unlabelled_names
    for node in (found[index] for index in reads):
        features = objective.features(torch.rand(4, *node.shape))
        assert features.shape == (4, np.prod(node.shape) if name != "sll+" else node.shape[1])


@pytest.mark.parametrize("name", ["ff", "symba"])
def test_labels_are_written_over_the_first_inputs(name):
    learner = next(learners(name, True))
    x, streams = learner.read["x"], learner.shown().streams
    unlabelled = learner.objective.unlabelled_streams(x)
    for values in (*streams.values(), *unlabelled.values()):
        assert torch.equal(values[:, CLASSES:], x[:, CLASSES:])
    assert torch.equal(streams["pos"][:, :CLASSES].argmax(1), learner.y)
    assert (streams["neg"][:, :CLASSES].argmax(1) != learner.y).all()
    assert torch.equal(streams["pos"][:, :CLASSES].sum(1), torch.ones(ROWS, dtype=x.dtype))
    assert torch.equal(streams["neutral"], unlabelled["neutral"])
    assert streams["neutral"][:, :CLASSES].unique().tolist() == [1 / CLASSES]
    for label in range(CLASSES):
        expected = one_hot(torch.full((ROWS,), label), CLASSES).to(x.dtype)
        assert torch.equal(unlabelled[f"label{label}"][:, :CLASSES], expected)


def test_wrong_labels_belong_to_sample_and_epoch_and_are_all_as_likely():
    objective, classes, rows = ALL["ff"](5, {}), 5, 2000
    x, y = torch.zeros(rows, 6), torch.arange(rows) % classes

    def wrong(epoch, samples, cell=0, step=0):
        draws = StepDraws(SEED, cell, epoch, step, samples)
        return objective.streams(x[: len(samples)], y[torch.from_numpy(samples)], draws)["neg"][:, :classes].argmax(1)

    everyone = np.arange(rows)
    found = wrong(0, everyone)
    pairs = Counter(zip(y.tolist(), found.tolist(), strict=True))
    assert len(pairs) == classes * (classes - 1)  # never the right one
    assert 60 < min(pairs.values()) < max(pairs.values()) < 140  # 100 each by chance
    assert torch.equal(wrong(0, everyone[::-3].copy(), cell=2, step=7), found[torch.from_numpy(everyone[::-3].copy())])
    assert 0.1 < (wrong(1, everyone) == found).double().mean() < 0.4  # 1 / 4 by chance


# -- fixed matrices ------------------------------------------------------------------------------------


def fixed(learner):
    """Names of a learner's tensors that no optimizer changes."""
    learned = {f"cell.{name}" for name, _ in learner.cell.named_parameters()}
    learned |= {f"head.{name}" for name, _ in learner.head.named_parameters()}
    return {name for name in learner.values if name not in learned}


def test_projections_are_drawn_from_the_cell_and_never_stored():
    first, second = learners("sll", net="mlp:60,50", shape=(70,))
    for learner, inputs, units in ((first, 70, 60), (second, 60, 50)):
        assert learner.values["head.own"].shape == (units, CLASSES)
        assert learner.values["head.parent"].shape == (inputs, CLASSES)
        assert learner.values["head.own"].std().item() == pytest.approx(units**-0.5, rel=0.25)
        assert fixed(learner) == {"head.own", "head.parent"}
        assert not learner.head.state_dict()
    assert torch.equal(second.values["head.parent"], first.values["head.own"])


def test_feedback_is_drawn_as_weights_are_and_never_stored():
    (learner,) = learners("fa", net="mlp:60,50", shape=(70,))
    assert fixed(learner) == {"cell.0.linear.feedback", "cell.1.linear.feedback", "head.feedback"}
    (plain,) = learners("bp", net="mlp:60,50", shape=(70,))
    for name, weight in plain.values.items():
        assert torch.equal(learner.values[name], weight)  # it starts where backpropagation starts
    for name in fixed(learner):
        weight = learner.values[name.replace("feedback", "weight")]
        assert not torch.equal(learner.values[name], weight)
        assert learner.values[name].std().item() == pytest.approx(weight.std().item(), rel=0.15)
    assert not [name for part in (learner.cell, learner.head) for name in part.state_dict() if "feedback" in name]

    (learner,) = learners("dfa", net="mlp:60,50", shape=(70,))
    assert fixed(learner) == {"head.feedback.0", "head.feedback.1"}
    for name, units in (("head.feedback.0", 60), ("head.feedback.1", 50)):
        assert learner.values[name].shape == (CLASSES, units)
        assert learner.values[name].std().item() == pytest.approx(CLASSES**-0.5, rel=0.25)
    assert not [name for name in learner.head.state_dict() if "feedback" in name]


# -- gradients -----------------------------------------------------------------------------------------


def test_gradients_of_mono_forward_are_those_worked_out_by_hand():
    for learner in learners("mf"):
        (learner.loss().loss / ROWS).backward()
        x, w, m = learner.read["x"], learner.cell.linear.weight.detach(), learner.head.weight.detach()
        z = x @ w.T
        a = z.clamp(min=0)
        d = (torch.softmax(a @ m.T, 1) - one_hot(learner.y, CLASSES)) / ROWS
        dz = (d @ m) * (z > 0)
        torch.testing.assert_close(learner.head.weight.grad, d.T @ a, rtol=0, atol=TINY)
        torch.testing.assert_close(learner.cell.linear.weight.grad, dz.T @ x, rtol=0, atol=TINY)
        assert learner.cell.linear.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["fa", "dfa"])
def test_errors_come_back_through_the_fixed_matrices(name):
    (learner,) = learners(name)
    (learner.loss().loss / ROWS).backward()
    p, x = learner.values, learner.read["x"]
    classifier = "head" if name == "fa" else "head.classifier"
    z = [dense(p, "cell.0.linear", x)]
    z.append(dense(p, "cell.1.linear", z[0].clamp(min=0)))
    logits = dense(p, classifier, z[1].clamp(min=0))
    e = (torch.softmax(logits, 1) - one_hot(learner.y, CLASSES)) / ROWS
    if name == "fa":
        dz1 = (e @ p["head.feedback"]) * (z[1] > 0)
        dz0 = (dz1 @ p["cell.1.linear.feedback"]) * (z[0] > 0)
    else:
        dz1, dz0 = ((e @ p[f"head.feedback.{index}"]) * (z[index] > 0) for index in (1, 0))
    head = learner.head if name == "fa" else learner.head["classifier"]
    for layer, dz, a in (
        (head, e, z[1].clamp(min=0)),
        (learner.cell[1].linear, dz1, z[0].clamp(min=0)),
        (learner.cell[0].linear, dz0, x),
    ):
        torch.testing.assert_close(layer.weight.grad, dz.T @ a, rtol=0, atol=TINY)
        torch.testing.assert_close(layer.bias.grad, dz.sum(0), rtol=0, atol=TINY)
        assert layer.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["bp-checkpoint", "bp-offload"])
def test_thrifty_forms_have_the_gradients_of_backpropagation(name):
    gradients = []
    for kind in ("bp", name):
        (learner,) = learners(kind)
        learner.loss().loss.backward()
        gradients.append({name: value.grad for name, value in learner.cell.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


def test_each_phase_of_an_adversarial_cell_learns_what_the_other_does_not():
    discriminating, generating = ALL["lbp-gan"].phases
    for learner in learners("lbp-gan"):
        names = named(learner.cell, learner.head)
        assert all(discriminating.parameters(name) != generating.parameters(name) for name in names)
        learner.loss("discriminator").loss.backward()
        reached = {name for name, value in learner.head.named_parameters() if value.grad is not None}
        assert reached == {name for name, _ in learner.head.named_parameters() if name.startswith("discriminator")}
        assert all(value.grad is None for value in learner.cell.parameters())
        learner.loss("generator").loss.backward()
        assert all(value.grad is not None for value in learner.cell.parameters())


def test_the_projection_of_a_convolutional_cell_reads_the_flattened_pooled_map():
    for learner in learners("mf", net="cnn:4,5", shape=(2, 9, 8)):
        pooled = avg_pool2d(conv2d(learner.read["x"], learner.cell.conv.weight, padding=1).clamp(min=0), 2)
        logits = pooled.reshape(ROWS, -1) @ learner.head.weight.T
        torch.testing.assert_close(learner.loss().loss, negative_log_likelihood(logits, learner.y), rtol=TINY, atol=0)


# -- nothing flows back --------------------------------------------------------------------------------


@EVERY_CASE
def test_what_a_step_hands_out_carries_no_gradient_even_where_its_input_does(name, trained):
    for learner in learners(name, trained):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)  # stands for the cell before
        attached = {stream: (values * scale).relu() for stream, values in learner.read.items()}
        step = learner.loss(read=attached)
        assert step.loss.requires_grad
        handed = [*(step.emitted or {}).values(), *([] if step.scores is None else [step.scores])]
        assert not any(value.requires_grad for value in handed)


@EVERY_CASE
def test_what_a_step_emits_and_scores_is_what_the_cell_makes_of_clean_inputs(name, trained):
    for learner in learners(name, trained):
        objective, streams = learner.objective, learner.shown().streams
        step = learner.loss()
        with torch.no_grad():
            latents = objective.latent(learner.cell, streams)
        assert step.emitted is None or step.emitted.keys() == latents.keys() == set(objective.stream_names)
        assert all(torch.equal(values, latents[stream]) for stream, values in (step.emitted or {}).items())
        if step.scores is not None:
            with torch.no_grad():
                handed_on, scores = objective.read(learner.cell, learner.head, streams)
            assert torch.equal(step.scores, scores)
            assert all(torch.equal(values, latents[stream]) for stream, values in handed_on.items())


@pytest.mark.parametrize("name", ["lbp-dae", "lbp-gan", *BASELINES])
def test_rules_whose_pass_is_not_on_clean_inputs_leave_the_latents_to_the_machine(name):
    assert all(learner.loss().emitted is None for learner in learners(name))


def given(name, **values):
    standard = {"epochs": 2, "batch_size": BATCH, "micro_batch": BATCH, "seed": SEED, "threads": 1}
    standard |= {"net": SUITED.get(name, (NET,))[0], "lr": LR, "device": "cpu", "normalize": "none"}
    return Settings().with_values({"method": name, **standard, **values})


def toy(rows=ROWS, shape=SHAPE):
    """Pixels that lie around one centre per class."""
    draw = np.random.default_rng(9)
    y = np.arange(rows) % CLASSES
    centres = draw.integers(60, 190, (CLASSES, *shape))
    return (centres[y] + draw.integers(-50, 50, (rows, *shape))).astype(np.uint8), y


def data_for(name):
    return from_arrays(toy(shape=suited(name)[1]), reading=Reading("image"))


@pytest.mark.parametrize("placement", ["stream", "resident"])
@EVERY_CASE
def test_the_machine_shows_a_rule_inputs_that_have_no_history(tmp_path, monkeypatch, name, trained, placement):
    if ALL[name].streams_layers:
        pytest.skip("the gradient of a layer's inputs goes on to the layer before")
    peaks_unknown(monkeypatch)
    loss, seen = ALL[name].loss, []

    def looks(self, phase, cell, head, batch):
        seen.append(any(value.requires_grad or value.grad_fn for value in batch.streams.values()))
        assert torch.is_grad_enabled()
        return loss(self, phase, cell, head, batch)

    monkeypatch.setattr(ALL[name], "loss", looks)
    values = {} if name in BASELINES else {"schedule": "sequence"}
    if trained and ALL[name].vote != "classifier":
        values["classifier_epochs"] = 2
    fit(given(name, placement=placement, **values), tmp_path / "run", data=data_for(name))
    assert seen
    assert not any(seen)


# -- learning and coming back --------------------------------------------------------------------------


class Losses(Callback):
    """Keeps the training losses of each node."""

    def __init__(self):
        self.found = {}

    def visited(self, progress):
        self.found.setdefault(progress.node, []).append(progress.loss)


#: What a rule needs to learn the toy, where it differs.
LEARNING = {
    "lbp-gan": {"net": "mlp:60x2", "epochs": 12, "lr": 3e-3},
    "ff": {"net": "mlp:60x2", "epochs": 20},
    "symba": {"net": "mlp:60x2", "epochs": 20},
    "sll": {"net": "mlp:60x2"},
    "fa": {"epochs": 12},
    "dfa": {"epochs": 12},
    "slp": {"epochs": 12},
}
WIDE = (14,)  # so that a label written over the first inputs leaves something to see


@EVERY_CASE
def test_the_loss_of_every_cell_falls_on_a_toy(tmp_path, monkeypatch, name, trained):
    peaks_unknown(monkeypatch)
    values = {"epochs": 6, "lr": 1e-2, "net": SUITED.get(name, ("mlp:12x2",))[0], **LEARNING.get(name, {})}
    if trained:
        values |= {"classifier_lr": 3e-2, "classifier_epochs": values["epochs"]}
    callback, shape = Losses(), SUITED.get(name, (NET, WIDE))[1]
    data = from_arrays(toy(150, shape), toy(60, shape), reading=Reading("image"))
    run = fit(given(name, **values), tmp_path / "run", data=data, callback=callback)
    assert len(callback.found) == (1 if ALL[name].streams_layers else len(run.nodes)) + trained
    assert all(found[-1] < 0.9 * found[0] for found in callback.found.values())
    assert run.record.test_accuracy > 0.6  # 1 / 3 by chance
    assert run.record.votes.get("classifier", 0.0) > 0.6 or not trained


@EVERY_CASE
def test_a_cell_that_left_the_device_goes_on_as_if_it_had_stayed(name, trained):
    objective, found = chain(name, trained)
    node, recipe = found[-1], OptimizerRecipe("adamw", LR, 1e-2)
    latents, source = DeviceLatents(ROWS, "float32", False), torch.Generator().manual_seed(1)
    names = objective.stream_names if node.index else ("x",)
    latents.put(0, {stream: torch.rand(ROWS, *node.parent.shape, generator=source) for stream in names})
    order, setup = np.random.default_rng(2).permutation(ROWS), Setup(objective, recipe, CPU)

    def steps(cell, first, last):
        reader = reader_of(latents, labels(), prepare=None if node.index else training_inputs(objective))
        train_steps(cell, reader, Span(ROWS, BATCH, BATCH, first, last, order))
        return flat(cell.state_dict())

    stayed = steps(ResidentCell(node, setup), 0, 3)
    left = steps(ResidentCell(node, setup), 0, 2)
    returned = steps(ResidentCell(node, setup, state_of(left)), 2, 3)
    assert sorted(returned) == sorted(stayed)
    assert all(torch.equal(returned[key], stayed[key]) for key in stayed)
    bare = {key: value for key, value in left.items() if not key.startswith("optim.")}
    forgetful = steps(ResidentCell(node, setup, state_of(bare)), 2, 3)
    assert any(not torch.equal(forgetful[key], stayed[key]) for key in bare)


# -- toys: what later rules need -----------------------------------------------------------------------


def register(monkeypatch, kind):
    monkeypatch.setitem(METHODS._own, kind.name, kind)


def trained(path, name, **values):
    """Final tensors of a run on the toy data, by unit and name."""
    folder = RunFolder(fit(given(name, **values), path / "run", data=from_arrays(toy(), reading=Reading("image"))).path)
    files = folder.files()
    return {
        f"{unit}/{key}": value for unit in files for key, value in units_named(folder.units.read(files[unit])).items()
    }


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
    run = fit(
        given("toy-streams", placement="stream"), tmp_path / "run", data=from_arrays(toy(), reading=Reading("image"))
    )
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
    """The first phase changes what the cell emits."""

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
