"""Runs of the real machine on small random data, for the tests that compare it with plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import count
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.errors import Stopped
from edgetrain.keys import seeded
from edgetrain.memory.meter import meter_of
from edgetrain.objectives.base import Batch
from edgetrain.objectives.mf import MonoForward
from edgetrain.store.entries import FORMAT, Begin
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import Setup
from edgetrain.stream.classifier import Classifier, ClassifierRecipe
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.executor import Executor
from edgetrain.stream.latents import DeviceLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.outputs import Outputs, Tally
from edgetrain.stream.reader import Reader
from edgetrain.stream.state import CellState
from edgetrain.training.fit import fit
from edgetrain.training.job import open_job
from edgetrain.training.stopping import Stop

ROWS, TEST_ROWS, CLASSES, EPOCHS, BATCH, SEED = 70, 9, 4, 3, 16, 5  # the last batch holds 6 rows
NET = "mlp:23x3"  # rows of odd length: nothing stands on a convenient address by luck
UNEVEN = "mlp:24,23,17"
SCHEDULES, PLACEMENTS = ("separate", "sequence"), ("stream", "resident")
LR, WEIGHT_DECAY = 3e-3, 3e-2  # neither the methods' own nor torch's, so that one ignored shows
CPU = torch.device("cpu")
EVERY_WAY = pytest.mark.parametrize(
    ("schedule", "placement"), [(schedule, placement) for schedule in SCHEDULES for placement in PLACEMENTS]
)

# How close: float32 where last bits differ (Adam divides a gradient near zero by itself, so that a hundredth of
# a step may come of it), and float64.
ALMOST = {"rtol": 1e-5, "atol": LR / 100}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


# -- runs that end early ---------------------------------------------------------------------------------


def stopping_after(questions):
    """A stand-in for ``Stop.asked`` that says yes from the Nth question of a process on."""

    def asked(self):
        number = vars(self).setdefault("questions", count())
        return next(number) >= questions

    return asked


def stopped_after(questions, asked, path, rows, resume=False, callback=None):
    """Let a run end early; what it says."""
    with mock.patch.object(Stop, "asked", stopping_after(questions)), pytest.raises(Stopped) as told:
        fit(asked, path, data=rows, resume=resume, callback=callback)
    return str(told.value)


# -- data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Random rows, raw and as the first cell reads them."""

    raw: np.ndarray
    labels: np.ndarray

    @property
    def read(self):
        """All rows, those of the test too."""
        values = torch.from_numpy(self.raw).float()
        values = values / 255 if self.raw.dtype == np.uint8 else values
        return values.unsqueeze(1) if values.ndim == 3 else values

    @property
    def x(self):
        return self.read[:ROWS]

    @property
    def y(self):
        return torch.from_numpy(self.labels[:ROWS])

    @property
    def set(self):
        train, test = ((self.raw[part], self.labels[part]) for part in (slice(ROWS), slice(ROWS, None)))
        return from_arrays(train, test, reading=Reading("image"))


@cache
def data(kind):
    draw = np.random.default_rng(3)
    rows = ROWS + TEST_ROWS
    raw = {
        "pixels": lambda: draw.integers(0, 256, (rows, 21), dtype=np.uint8),
        "images": lambda: draw.integers(0, 256, (rows, 9, 8), dtype=np.uint8),
        "odd images": lambda: draw.integers(0, 256, (rows, 7, 6), dtype=np.uint8),
        "wide images": lambda: draw.integers(0, 256, (rows, 2, 4, 8), dtype=np.uint8),
        "floats": lambda: draw.random((rows, 3, 7), dtype=np.float32),  # images: values as they are
    }[kind]()
    labels = np.concatenate([np.arange(CLASSES), draw.integers(0, CLASSES, rows - CLASSES)])
    return Data(raw, labels)


# -- runs ----------------------------------------------------------------------------------------------


def settings(method, **values):
    standard = {
        "net": NET, "epochs": EPOCHS, "batch_size": BATCH, "micro_batch": BATCH, "seed": SEED, "threads": 1,
        "lr": LR, "device": "cpu", "normalize": "none", "memory_format": "contiguous",
    }  # fmt: skip
    if method.startswith("lbp"):
        decay = {"weight_decay": WEIGHT_DECAY, "classifier_weight_decay": WEIGHT_DECAY, "classifier_lr": 2 * LR}
        standard |= decay
    return Settings().with_values({"method": method, **standard, **values})


def begin(config=""):
    """A run's first journal entry."""
    return Begin(format=FORMAT, config=config, net=[])


def units(path):
    """All saved tensors of a run, weights and optimizer state, by unit and name."""
    folder = RunFolder(path)
    return {
        f"{unit}/{name}": value
        for unit, kinds in folder.files().items()
        for name, value in named(folder.units.read(kinds)).items()
    }


def named(kinds):
    """A unit's tensors by one name each, its optimizer state as ``optim.*``."""
    return {**kinds["weights"], **{f"optim.{name}": value for name, value in kinds.get("optim", {}).items()}}


def flat(state):
    """A cell's tensors by one name each."""
    return named(state.to_kinds())


def state_of(tensors):
    """The state of a cell whose tensors ``flat`` gave."""
    kinds = {"weights": {}, "optim": {}}
    for name, value in tensors.items():
        kind = "optim" if name.startswith("optim.") else "weights"
        kinds[kind][name.removeprefix("optim.")] = value
    return CellState.of_kinds(kinds)


def finished(path, method, kind="pixels", **values):
    """A run of its own."""
    return fit(settings(method, **values), path / "run", data=data(kind).set)


def trained(path, method, kind="pixels", **values):
    """The final tensors of a run of its own."""
    return units(finished(path, method, kind, **values).path)


def work_of(method, kind, **values):
    """Cells and rule of a run, before it begins."""
    return open_job(settings(method, **values), data=data(kind).set).work


def first_weights(method, kind, **values):
    """First cell modules and heads, by the recipes."""
    work = work_of(method, kind, **values)
    cells, heads = [], []
    for node in work.nodes:
        cells.append(node.recipe.materialise(SEED, node.index))
        with seeded(SEED, "head", node.index):
            heads.append(work.objective.head(node))
    return cells, heads


def drawn(cell, epoch, step, rows):
    """The machine's random numbers of a step; those that belong to samples are not among them."""
    return StepDraws(SEED, cell, epoch, step, np.arange(rows))


def keyed_noise(cell, epoch, step, like):
    return drawn(cell, epoch, step, len(like)).normal("noise", like)


# -- comparisons ---------------------------------------------------------------------------------------


def learned(unit, optimizer, parameters, phase="step"):
    """A reference's parameters and their optimizer state under the names of a run's files."""
    values = {f"{unit}/{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, moment in optimizer.state[value].items():
            values[f"{unit}/optim.{phase}.{name}.{key}"] = moment
    return values


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing


def assert_close(found, expected, rtol, atol):
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def gradients(parameters):
    """The gradients of named parameters."""
    return {name: value.grad for name, value in parameters.items()}


def shown(x, y):
    """One batch as the machine shows it to the first step of the first cell."""
    return Batch(x if isinstance(x, dict) else {"x": x}, y, drawn(0, 0, 0, len(y)))


def step_of(objective, cell, head, batch):
    """Mean loss and gradients of one step of a rule's only phase, in whatever precision the parts have."""
    parts = nn.ModuleDict({name: part for name, part in (("cell", cell), ("head", head)) if part is not None})
    loss = objective.loss("step", cell, head, batch).loss / len(batch.y)
    loss.backward()
    return loss.detach(), gradients(dict(parts.named_parameters()))


# -- passes of one cell --------------------------------------------------------------------------------


def labels_on_device(y):
    """A reader's source of labels [rows]."""
    made = DeviceLatents(len(y), "int64", False)
    made.put(0, {"y": y})
    return made.source()


def reader_of(latents, y, **how):
    """A reader of latents, or of a list of them, and labels [rows]."""
    several = latents if isinstance(latents, list) else [latents]
    return Reader([each.source() for each in several], labels_on_device(y), CPU, **how)


def train_steps(cell, reader, span, sink=None, tally=None, seed=SEED, meter=None):
    """Train a cell over a span; what the steps have come to."""
    tally = tally or Tally(CPU)
    Executor(meter or meter_of(CPU, False), seed).train(cell, reader, span, Outputs(tally, sink))
    return tally.read()


def in_double(state):
    """A cell's state in float64; counts stay as they are."""
    return state.map(lambda value: value.double() if value.is_floating_point() and value.ndim else value)


# -- the trained classifier ----------------------------------------------------------------------------


def classifier_of(widths, optimizer, state=None, resident=True, rule=None, seed=SEED, host=None):
    """The classifier on latents of these widths, of a rule that reads them flattened."""
    rule = rule or MonoForward(CLASSES, {"bias": "0"})
    setup = Setup(rule, optimizer, CPU) if host is None else Setup(rule, optimizer, CPU, host)
    return Classifier(ClassifierRecipe(len(widths), widths, seed, resident), setup, state)


def classifier_blocks(widths, dtype=torch.float32):
    """The first blocks of the classifier, by their names in files."""
    state = classifier_of(widths, OptimizerRecipe("adamw", LR)).state_dict()
    return {name: value.to(dtype) for name, value in flat(state).items()}


def joined_of(blocks, pattern="head.{}.weight"):
    """The matrix [C, sum of n_l] that the classifier's blocks are cut from."""
    count = sum(name.endswith(".weight") and not name.startswith("optim.") for name in blocks)
    return torch.cat([blocks[pattern.format(index)] for index in range(count)], 1)


def split_off_classifier(found):
    """The cells' tensors, and the classifier's by its own names."""
    cells = {name: value for name, value in found.items() if not name.startswith("classifier/")}
    return cells, {name.removeprefix("classifier/"): value for name, value in found.items() if name not in cells}


def assert_classifier_close(blocks, classifier, rtol=2e-5, atol=2e-6):
    """The streamed classifier sums over cells where the plain one sums along the concatenation: no equal bits."""
    layer, state = classifier.layer, classifier.optimizer.state
    torch.testing.assert_close(joined_of(blocks), layer.weight.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(blocks["head.0.bias"], layer.bias.detach(), rtol=rtol, atol=atol)
    for key, value in state[layer.weight].items():
        if key != "step":
            found = joined_of(blocks, f"optim.step.head.{{}}.weight.{key}")
            torch.testing.assert_close(found, value, rtol=rtol, atol=atol / 10)
    assert blocks["optim.step.head.0.bias.step"] == state[layer.bias]["step"]
