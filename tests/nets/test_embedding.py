"""Nets on token data. ``pytest tests/nets/test_embedding.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgetrain.errors import InputError
from edgetrain.memory.meter import LiveBytes
from edgetrain.nets.embedding import mean_embedding
from edgetrain.nets.spec import NETS, open_net

VOCABULARY, TOKENS = 30, 9


def naive_mean(weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[V, D] and [B, L] -> [B, D], token by token."""
    means = []
    for row in tokens:
        vectors = [weight[token] for token in row if token != 0]
        means.append(torch.stack(vectors).mean(0) if vectors else torch.zeros_like(weight[0]))
    return torch.stack(means)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=4, max_size=4), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_the_embedding_is_the_mean_over_tokens_that_are_not_padding(tokens: list[list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    cell, ids = mean_embedding(VOCABULARY, 5).double(), torch.tensor(tokens)
    weight = cell.get_parameter("embedding.weight")
    pull = torch.randn(len(tokens), 5, dtype=torch.float64)
    expected = naive_mean(weight, ids)
    torch.testing.assert_close(cell(ids), expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * pull).sum(), weight)[0] if expected.requires_grad else 0 * weight
    (cell(ids) * pull).sum().backward()
    assert weight.grad is not None
    assert weight.grad.layout is torch.strided
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-12, atol=1e-12)


def test_a_row_of_padding_gives_zeros_and_teaches_nothing() -> None:
    cell, tokens = mean_embedding(VOCABULARY, 5), torch.zeros(2, TOKENS, dtype=torch.int64)
    out = cell(tokens)
    out.sum().backward()
    assert not out.any()
    grad = cell.get_parameter("embedding.weight").grad
    assert grad is not None
    assert not grad.any()


def test_first_weights_are_those_of_an_embedding() -> None:
    torch.manual_seed(4)
    expected = nn.Embedding(VOCABULARY, 5, padding_idx=0).weight
    torch.manual_seed(4)
    assert torch.equal(mean_embedding(VOCABULARY, 5).get_parameter("embedding.weight"), expected)


def test_it_runs_on_fake_tensors_and_never_holds_a_vector_for_each_token() -> None:
    batch, tokens, width = 16, 200, 50
    with FakeTensorMode(), LiveBytes() as meter:
        cell = mean_embedding(VOCABULARY, width)
        out = cell(torch.zeros(batch, tokens, dtype=torch.int64))
        out.sum().backward()
        grad = cell.get_parameter("embedding.weight").grad
    assert tuple(out.shape) == (batch, width)
    assert grad is not None
    assert tuple(grad.shape) == (VOCABULARY, width)
    assert meter.peak < batch * tokens * width * 4 / 2


def test_an_mlp_on_tokens_begins_with_the_embedding() -> None:
    net = open_net("mlp:7,6;embedding=11", (TOKENS,), {}, VOCABULARY)
    assert [cell.name for cell in net.cells] == ["embedding 30-11", "linear 11-7", "linear 7-6"]
    assert [cell.in_shape for cell in net.cells] == [(TOKENS,), (11,), (7,)]
    assert net.in_shape == (TOKENS,)
    assert [cell.parameters() for cell in net.cells] == [30 * 11, 11 * 7 + 7, 7 * 6 + 6]
    x: Any = torch.randint(0, VOCABULARY, (4, TOKENS))
    for index, cell in enumerate(net.cells):
        x = cell.materialise(0, index)(x)
        assert tuple(x.shape[1:]) == cell.out_shape


def test_the_embedding_is_50_wide_if_nothing_is_said() -> None:
    assert open_net("mlp:7", (TOKENS,), {}, VOCABULARY).cells[0].out_shape == (50,)


def test_the_embedding_is_the_first_cell_of_the_net_for_rms() -> None:
    net = open_net("mlp:7,7;prenorm=rms", (TOKENS,), {}, VOCABULARY)
    assert ["prenorm" in dict(cell.skeleton().named_children()) for cell in net.cells] == [False, True, True]


def test_the_embeddings_signature_says_what_it_costs() -> None:
    nets = [("mlp:7", 30, 9), ("mlp:7", 31, 9), ("mlp:7", 30, 8), ("mlp:7;embedding=8", 30, 9)]
    found = {open_net(spec, (tokens,), {}, size).cells[0].signature for spec, size, tokens in nets}
    assert len(found) == 4
    assert open_net("mlp:9", (9,), {}, 30).cells[0].signature in found


@pytest.mark.parametrize("family", [family for family in NETS if family != "mlp"])
def test_other_families_refuse_tokens(family: str) -> None:
    with pytest.raises(InputError, match="needs images; the data have rows of token ids: use mlp:"):
        open_net(f"{family}:4", (TOKENS,), {}, VOCABULARY)


def test_a_users_net_is_tried_on_token_ids() -> None:
    net = open_net([nn.Embedding(VOCABULARY, 4), nn.Flatten(), nn.Linear(4 * TOKENS, 3)], (TOKENS,), {}, VOCABULARY)
    assert [cell.out_shape for cell in net.cells] == [(TOKENS, 4), (3,)]
    assert [cell.in_shape for cell in open_net(lambda: [nn.Embedding(9, 2)], (3,), {}, 9).cells] == [(3,)]
    with pytest.raises(InputError, match=r"cell 1 \(Flatten\) must return floating-point numbers; it returned int64"):
        open_net([nn.Flatten()], (TOKENS,), {}, VOCABULARY)
    with pytest.raises(
        InputError, match=r"Embedding takes token ids, but the rows are numbers .* state --input tokens"
    ):
        open_net([nn.Embedding(VOCABULARY, 4)], (TOKENS,), {})
