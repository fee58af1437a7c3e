"""The classifier on all cells' latents against a linear map on their concatenation.

``pytest tests/stream/test_classifier.py``
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import classifier_of, flat, labels_on_device, reader_of, train_steps
from torch import nn
from torch.nn.functional import cross_entropy

from edgetrain.memory.meter import LiveMeter
from edgetrain.objectives.mf import MonoForward
from edgetrain.store.latents import LatentFile
from edgetrain.stream.classifier import Classifier
from edgetrain.stream.latents import DeviceLatents, FileLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.outputs import Tally
from edgetrain.stream.reader import LABELS, LabelFile, Reader
from edgetrain.stream.span import Span
from edgetrain.stream.state import CellState

CPU = torch.device("cpu")
ROWS, CLASSES = 22, 4
SHAPES = [(5,), (2, 3), (1,)]
WIDTHS = [5, 6, 1]
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
}


def classifier(optimizer: str, resident: bool, state: CellState | None = None) -> Classifier:
    return classifier_of(WIDTHS, OptimizerRecipe(optimizer, 0.05, 0.01), state, resident, Flat(CLASSES, {"bias": "0"}))


class Flat(MonoForward):
    """A rule whose classifier reads latents flattened."""


def twin(state: CellState, optimizer: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A linear map on the concatenation that starts from the same values."""
    linear = nn.Linear(sum(WIDTHS), CLASSES)
    with torch.no_grad():
        linear.weight.copy_(torch.cat([state.head[f"{index}.weight"] for index in range(len(WIDTHS))], 1))
        linear.bias.copy_(state.head["0.bias"])
    return linear, OPTIMIZERS[optimizer](linear.parameters(), lr=0.05, weight_decay=0.01)


def latents(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    z = [torch.rand(ROWS, *shape, generator=source) for shape in SHAPES]
    return z, torch.randint(0, CLASSES, (ROWS,), generator=source)


def reader_at(
    folder: Path, z: list[torch.Tensor], y: torch.Tensor, kind: str, step_order: bool, stream: str = "x"
) -> Reader:
    """Latents where ``kind`` says; with ``step_order``, rows are in the epoch's order already."""
    made: list[DeviceLatents | FileLatents] = []
    for index, values in enumerate(z):
        if kind == "device":
            made.append(DeviceLatents(ROWS, "float32", step_order))
        else:
            ignored = (nullcontext, lambda size: None, lambda size: None)
            made.append(FileLatents(folder, f"{index}", ROWS, "float32", step_order, *ignored, False))
        made[-1].sink().put(0, {"pos": values + 1, stream: values})
    sources = [each.source([stream]) for each in made]
    if kind == "device":
        return Reader(sources, labels_on_device(y), CPU)
    labels = LatentFile(folder / "y.rows", ROWS, LABELS).allocate()
    labels.write(0, LABELS.encode(y))
    return Reader(sources, LabelFile(labels), CPU)


def assert_close(found: CellState, linear: nn.Linear) -> None:
    expected = linear.weight.detach().split(WIDTHS, 1)
    for index, block in enumerate(expected):
        torch.testing.assert_close(found.head[f"{index}.weight"], block, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.head["0.bias"], linear.bias.detach(), rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    optimizer=st.sampled_from(["sgd", "adam", "adamw", "adamax"]),
    resident=st.booleans(),
    kind=st.sampled_from(["device", "files"]),
    batch=st.integers(1, 25),
    micro=st.integers(1, 25),
    step_order=st.booleans(),
    ordered=st.booleans(),
)
def test_steps_equal_those_of_one_linear_map_on_the_concatenation(
    optimizer: str,
    resident: bool,
    kind: str,
    batch: int,
    micro: int,
    step_order: bool,
    ordered: bool,
    tmp_path: Path,
) -> None:
    z, y = latents()
    order = np.random.default_rng(0).permutation(ROWS) if ordered else None
    picked = torch.arange(ROWS) if order is None else torch.from_numpy(order)
    stored = [values[picked] for values in z] if step_order else z
    steps = min(3, -(-ROWS // batch))
    if optimizer != "sgd":  # Adam divides by the gradient's size: a difference of rounding would grow
        steps = 1
    span = Span(ROWS, batch, min(micro, batch), 0, steps, order)
    found, tally = classifier(optimizer, resident), Tally(CPU)
    linear, updates = twin(found.state_dict(), optimizer)
    train_steps(found, reader_at(tmp_path, stored, y, kind, step_order), span, tally=tally)
    losses, right = [], 0
    for step in range(steps):
        samples = picked[slice(*span.bounds(step))]
        logits = linear(torch.cat([values[samples].flatten(1) for values in z], 1))
        right += int((logits.argmax(1) == y[samples]).sum())
        losses.append(float(cross_entropy(logits, y[samples], reduction="sum").detach()))
        updates.zero_grad()
        cross_entropy(logits, y[samples]).backward()
        tiny = min(float(value.grad.abs().max()) for value in linear.parameters() if value.grad is not None)
        assert tiny > 0
        updates.step()
    if optimizer == "sgd":
        assert_close(found.state_dict(), linear)
    else:
        assert_close_where_gradients_are_clear(found.state_dict(), linear)
    seen = min(span.last * batch, ROWS)
    loss, accuracy = tally.read().means
    assert loss == pytest.approx(sum(losses) / seen, rel=1e-5)
    assert accuracy == right / seen


def assert_close_where_gradients_are_clear(found: CellState, linear: nn.Linear) -> None:
    """Adam's first step is the gradient's sign: where that is rounding, so is the step."""
    assert linear.weight.grad is not None
    clear = (linear.weight.grad.abs() > 1e-5).split(WIDTHS, 1)
    for index, block in enumerate(linear.weight.detach().split(WIDTHS, 1)):
        torch.testing.assert_close(found.head[f"{index}.weight"][clear[index]], block[clear[index]], rtol=0, atol=5e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamax"])
def test_resident_and_streamed_blocks_are_the_same_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    z, y = latents()
    states = []
    for resident in (True, False):
        found = classifier(optimizer, resident)
        train_steps(found, reader_at(tmp_path, z, y, "device", False), Span(ROWS, 8, 3, 0, 3))
        states.append(flat(found.state_dict()))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamax"])
@pytest.mark.parametrize("residents", [(True, False), (False, True), (False, False)])
def test_a_state_taken_in_the_middle_goes_on_bit_for_bit(
    optimizer: str, residents: tuple[bool, bool], tmp_path: Path
) -> None:
    z, y = latents()
    reader = reader_at(tmp_path, z, y, "device", False)
    whole = classifier(optimizer, True)
    train_steps(whole, reader, Span(ROWS, 5, 5, 0, 5))
    half = classifier(optimizer, residents[0])
    train_steps(half, reader, Span(ROWS, 5, 5, 0, 2))
    rest = classifier(optimizer, residents[1], half.state_dict())
    train_steps(rest, reader, Span(ROWS, 5, 5, 2, 5))
    found, expected = flat(rest.state_dict()), flat(whole.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def lengths_and_signs(z: torch.Tensor) -> torch.Tensor:
    """Features that are others, and fewer, than the latents."""
    flat = z.flatten(1)
    return torch.stack([flat.norm(dim=1), flat.sum(1).sign()], 1)


class ReadsNeutral(MonoForward):
    """A rule whose classifier reads features of a stream of its own."""

    classifier_stream = "neutral"

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        return lengths_and_signs(latents)


@pytest.mark.parametrize("kind", ["device", "files"])
@pytest.mark.parametrize("micro", [3, 8])
def test_features_of_the_stream_that_is_read_are_what_the_classifier_sees(
    kind: str, micro: int, tmp_path: Path
) -> None:
    z, y = latents()
    order = np.random.default_rng(1).permutation(ROWS)
    reader = reader_at(tmp_path, [values - 0.5 for values in z], y, kind, False, "neutral")
    rule = ReadsNeutral(CLASSES, {"bias": "0"})
    found = classifier_of([2, 2, 2], OptimizerRecipe("sgd", 0.05), None, True, rule)
    linear = nn.Linear(6, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(torch.cat([found.state_dict().head[f"{index}.weight"] for index in range(3)], 1))
        linear.bias.copy_(found.state_dict().head["0.bias"])
    updates = torch.optim.SGD(linear.parameters(), lr=0.05)
    train_steps(found, reader, Span(ROWS, 8, micro, 0, 3, order))
    for batch in torch.from_numpy(order).split(8):
        features = torch.cat([lengths_and_signs(values[batch] - 0.5) for values in z], 1)
        updates.zero_grad()
        cross_entropy(linear(features), y[batch]).backward()
        updates.step()
    for index, block in enumerate(linear.weight.detach().split(2, 1)):
        torch.testing.assert_close(found.state_dict().head[f"{index}.weight"], block, rtol=0, atol=1e-6)


def test_first_values_are_keyed_and_bounded_as_a_linear_maps() -> None:
    first, again = classifier("sgd", True).state_dict().head, classifier("sgd", False).state_dict().head
    assert set(first) == {"0.bias", "0.weight", "1.weight", "2.weight"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    bound = sum(WIDTHS) ** -0.5
    assert all(float(value.abs().max()) <= bound for value in first.values())
    assert float(first["0.weight"].abs().max()) > bound / 2
    other = classifier_of(WIDTHS, OptimizerRecipe("sgd", 0.1), seed=4).state_dict().head
    assert not torch.equal(other["0.weight"], first["0.weight"])


@pytest.mark.parametrize("resident", [True, False])
def test_a_resident_state_is_a_copy(resident: bool) -> None:
    found = classifier("sgd", True)
    found.tile(0)
    found.state_dict().head["0.bias"].fill_(99)
    assert float(found.state_dict().head["0.bias"].abs().max()) < 1


def peak(widths: list[int], resident: bool) -> int:
    """Device bytes of two steps over cells of these widths."""
    meter, y = LiveMeter(full=True), torch.zeros(8, dtype=torch.int64)
    cells = []
    for width in widths:
        cells.append(DeviceLatents(8, "float32", False))
        cells[-1].put(0, {"x": torch.zeros(8, width)})
    found = classifier_of(widths, OptimizerRecipe("adam", 0.1), None, resident, host=meter.host)
    train_steps(found, reader_of(cells, y), Span(8, 4, 4, 0, 2), meter=meter)
    return meter.cell_peak


def test_streamed_blocks_need_the_same_memory_at_any_depth() -> None:
    assert peak([50] * 2, False) == peak([50] * 9, False)
    assert peak([50] * 9, True) > peak([50] * 9, False)
