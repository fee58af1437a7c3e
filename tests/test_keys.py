"""Every draw has an address and none comes from a shared stream. ``pytest tests/test_keys.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgetrain
from edgetrain.keys import derive, epoch_order, generator, per_sample, seeded

ROOT = Path(edgetrain.__file__).parents[1]
words = st.lists(st.integers(0, 99) | st.sampled_from(["cell", "head", "step", "order"]), max_size=4)


def test_keys_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert derive(0) == 4246866556266386882
    assert derive(7, "cell", 3) == 4573978539640900822


@settings(derandomize=True, max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), address=words, other=words)
def test_only_equal_addresses_give_equal_keys(seed: int, address: list, other: list) -> None:
    key = derive(seed, *address)
    assert 0 <= key < 1 << 63
    assert key == derive(seed, *address)
    assert (key == derive(seed, *other)) == (address == other)
    assert key != derive(seed ^ 1, *address)


def test_a_key_does_not_depend_on_the_process() -> None:
    code = "from edgetrain.keys import derive; print(derive(7, 'cell', 3))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(found.stdout) == derive(7, "cell", 3)


def test_a_generator_stands_at_the_start_of_its_draw() -> None:
    first = torch.randn(5, generator=generator("cpu", 1, "step", 2))
    assert torch.equal(first, torch.randn(5, generator=generator("cpu", 1, "step", 2)))
    assert not torch.equal(first, torch.randn(5, generator=generator("cpu", 1, "step", 3)))


def test_seeded_code_draws_from_its_key_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(6)
    torch.manual_seed(5)
    before = torch.rand(3)
    with seeded(1, "cell", 0):
        inside = torch.rand(4)
    after = torch.rand(3)
    assert torch.equal(torch.cat([before, after]), expected)
    torch.manual_seed(99)
    with seeded(1, "cell", 0):
        assert torch.equal(torch.rand(4), inside)


def test_the_global_stream_is_restored_when_the_body_fails() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(KeyError), seeded(1):
        torch.rand(7)
        raise KeyError
    assert torch.equal(torch.rand(3), expected)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**62), epoch=st.integers(0, 1000), rows=st.integers(1, 300))
def test_an_epochs_order_visits_each_sample_once(seed: int, epoch: int, rows: int) -> None:
    order = epoch_order(seed, epoch, rows)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(rows))
    assert np.array_equal(order, epoch_order(seed, epoch, rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {epoch_order(seed, epoch, 50).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def splitmix64(seed: int, number: int) -> float:
    """The number-th of SplitMix64 from ``seed``, with Python's own whole numbers."""
    mask = (1 << 64) - 1
    z = (seed + number * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def test_numbers_of_samples_are_the_same_on_every_machine_and_in_every_version() -> None:
    samples, address = [0, 5, 60_000, 1 << 40], (7, "sample", "augmentation", 1)
    found = per_sample(np.array(samples), 2, *address)
    assert found.tolist() == [[splitmix64(derive(*address), 2 * n + column) for column in (1, 2)] for n in samples]
    assert found[1].tolist() == [0.38791653098676493, 0.6446511585757577]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    address=words,
    samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
    columns=st.integers(1, 5),
)
def test_a_samples_numbers_do_not_depend_on_the_others(seed: int, address: list, samples: list, columns: int) -> None:
    numbers = np.array(samples, np.int64)
    found = per_sample(numbers, columns, seed, *address)
    assert found.shape == (len(samples), columns)
    assert found.dtype == np.float64
    assert ((found >= 0) & (found < 1)).all()
    for row, sample in enumerate(samples):
        assert np.array_equal(per_sample(np.array([sample]), columns, seed, *address), found[row : row + 1])
    assert np.array_equal(per_sample(numbers[::-1], columns, seed, *address), found[::-1])
    assert np.array_equal(numbers, np.array(samples))


def test_numbers_of_samples_are_evenly_spread_and_go_their_own_ways() -> None:
    samples = np.arange(20_000)
    found = per_sample(samples, 3, 1, "sample", "a", 0)
    others = [
        per_sample(samples, 3, *key) for key in ((1, "sample", "a", 1), (1, "sample", "b", 0), (2, "sample", "a", 0))
    ]
    columns = [*found.T, *(other[:, 0] for other in others)]
    for column in columns:
        shares = np.histogram(column, 20, (0, 1))[0] / len(samples)
        assert abs(shares - 0.05).max() < 0.006
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 0.03  # neighbours
    assert abs(np.corrcoef(columns) - np.eye(6)).max() < 0.03


def test_importing_the_keys_does_not_import_torch() -> None:
    code = "import edgetrain.keys, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"
