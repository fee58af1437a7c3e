"""No gradient reaches the previous cell, though nobody detaches what the cells hand to each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from machine import reader_of, train_steps

from edgetrain.nets.spec import open_net
from edgetrain.objectives import OBJECTIVES
from edgetrain.objectives.base import Batch, nodes
from edgetrain.stream.cell import ResidentCell, Setup
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.inputs import training_inputs
from edgetrain.stream.latents import DeviceLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.span import Span

CLASSES, ROWS, SEED = 3, 11, 4
CPU = torch.device("cpu")
NETS = {"lbp-cae": "cnn:4,5", "sll+": "vit:depth=2,width=6,heads=2,patch=2"}
SHAPE = (2, 4, 6)


class Keeps:
    """A sink that keeps what it is given as it is, with the graph that may hang on it."""

    def __init__(self):
        self.streams = {}

    def put(self, first, streams):
        assert first == 0
        self.streams = dict(streams)

    def close(self):
        """Nothing waits."""


@pytest.fixture(autouse=True)
def weights_stay(monkeypatch):
    """Steps change nothing, so that a graph that was kept by mistake could still be walked."""
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)


def reached(objective, net):
    """What the machine lets a first cell emit, and the parameters of it that the second one's losses reach."""
    first, second = (
        ResidentCell(node, Setup(objective, OptimizerRecipe("sgd", 0.1), CPU))
        for node in nodes(list(open_net(net, SHAPE, objective.net_defaults).cells), SHAPE, SEED)
    )
    latents, kept = DeviceLatents(ROWS, "float32", False), Keeps()
    latents.put(0, {"x": torch.rand(ROWS, *SHAPE, generator=torch.Generator().manual_seed(1))})
    y = torch.arange(ROWS) % CLASSES
    reader = reader_of(latents, y, prepare=training_inputs(objective))
    train_steps(first, reader, Span(ROWS, ROWS, ROWS, 0, 1, np.arange(ROWS)), kept)
    assert sorted(kept.streams) == sorted(objective.stream_names)
    assert all(value.grad is None for _, value in first.parameters())

    second.set_training(True)
    batch = Batch(kept.streams, y, StepDraws(SEED, 1, 0, 0, np.arange(ROWS)))
    for phase, _, _ in second.phases:
        objective.loss(phase.name, second.module, second.head, batch).loss.backward()
    learned = [value for name, value in second.parameters() if name.startswith("cell.")]
    assert learned
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in learned if value.ndim > 1)
    return kept.streams, [name for name, value in first.parameters() if value.grad is not None]


def opened(kind, trains_classifier=False):
    net = NETS.get(kind.name, "mlp:7,5")
    options = open_net(net, SHAPE, kind.net_defaults).options
    return kind(CLASSES, options, trains_classifier=trains_classifier), net


@pytest.mark.parametrize("trains_classifier", [False, True], ids=["", "with a classifier"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_reaches_the_previous_cell(name, trains_classifier):
    handed_on, found = reached(*opened(OBJECTIVES[name], trains_classifier))
    assert not any(value.requires_grad for value in handed_on.values())
    assert found == []


def attached(kind):
    """The rule without ``.detach()`` where it emits latents."""

    class Attached(kind):
        def loss(self, phase, cell, head, batch):
            return replace(super().loss(phase, cell, head, batch), emitted=self.latent(cell, batch.streams))

    return Attached


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_gradient_would_reach_it_if_latents_were_emitted_attached(name):
    """What the test above says is not true of any chain: here the second cell's loss reaches the first one."""
    handed_on, found = reached(*opened(attached(OBJECTIVES[name])))
    assert all(value.requires_grad for value in handed_on.values())
    assert {"cell.linear.weight", "cell.conv.weight", "cell.patches.conv.weight"} & set(found)
    assert not any(parameter.startswith("head.") for parameter in found)
