"""Vision transformers. ``pytest tests/nets/test_vit.py``."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgetrain.errors import InputError
from edgetrain.nets.layers import STANDARD
from edgetrain.nets.spec import open_net
from edgetrain.nets.vit import Block, PatchEmbedding, Sizes, read_sizes

PAPER = "vit:depth=7,width=384,heads=12,patch=4"
SMALL = "vit:depth=3,width=8,heads=2,patch=4"
SIZES = Sizes(depth=1, width=12, heads=3, patch=4, ratio=4)


# --- the block --------------------------------------------------------------------------------


def torchs_own(block: Block) -> nn.TransformerEncoderLayer:
    """PyTorch's pre-norm block with the same weights."""
    own = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.projection.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    state = block.state_dict()
    own.load_state_dict(
        {there + kind: state[here + kind] for there, here in names.items() for kind in ("weight", "bias")}
    )
    return own


@pytest.mark.parametrize("mode", [True, False])
def test_a_block_is_pytorchs_own(mode: bool) -> None:
    torch.manual_seed(1)
    block = Block(SIZES, STANDARD).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    own = torchs_own(block)  # stays in training mode: its evaluation has a fast path with other numbers
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(block.train(mode)(x), own(x), rtol=1e-12, atol=1e-12)
    pull = torch.randn(4, 7, 12, dtype=torch.float64)
    (block(x) * pull).sum().backward()
    (own(x) * pull).sum().backward()
    pairs = [
        (block.mlp[0], own.linear1),
        (block.attention.projection, own.self_attn.out_proj),
        (block.norm1, own.norm1),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block.attention.qkv.weight.grad, own.self_attn.in_proj_weight.grad)


def test_dropout_acts_on_what_is_added() -> None:
    block, x = Block(SIZES, {**STANDARD, "dropout": "0.5"}), torch.randn(4, 7, 12)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
    gone = Block(SIZES, {**STANDARD, "dropout": ".999999999"})
    torch.manual_seed(0)
    assert torch.equal(gone(x), x)


@pytest.mark.parametrize("training", [True, False])
def test_samples_do_not_depend_on_each_other(training: bool) -> None:
    cell, x = open_net(SMALL, (1, 8, 8), {}).cells[0].materialise(0, 0).double().train(training), torch.rand(5, 1, 8, 8)
    whole = cell(x.double())
    torch.testing.assert_close(torch.cat([cell(row[None]) for row in x.double()]), whole)


# --- patches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
def test_tokens_are_patches_row_by_row_with_their_positions(class_token: bool) -> None:
    torch.manual_seed(2)
    embedding = PatchEmbedding((2, 8, 12), SIZES, True, class_token).double()
    x = torch.randn(3, 2, 8, 12, dtype=torch.float64)
    kernel, bias, positions = embedding.conv.weight, embedding.conv.bias, embedding.positions
    assert bias is not None
    tokens = [
        torch.einsum("bcij,dcij->bd", x[:, :, row : row + 4, column : column + 4], kernel) + bias
        for row in (0, 4)
        for column in (0, 4, 8)
    ]
    if class_token:
        assert embedding.class_token is not None
        tokens.insert(0, embedding.class_token.expand(3, -1))
    torch.testing.assert_close(embedding(x), torch.stack(tokens, 1) + positions)


def test_positions_and_class_token_start_small() -> None:
    torch.manual_seed(0)
    embedding = PatchEmbedding((1, 32, 32), Sizes(1, 384, 12, 4), True, True)
    assert embedding.class_token is not None
    for drawn in (embedding.positions, embedding.class_token):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1)


# --- cells ------------------------------------------------------------------------------------


def test_the_papers_net_has_the_parameters_that_arithmetic_says() -> None:
    norms, attention, mlp = 4 * 384, 384 * 1152 + 1152 + 384 * 384 + 384, 2 * 384 * 768 + 768 + 384
    first = 3 * 16 * 384 + 384 + 65 * 384 + 384
    net = open_net(PAPER, (3, 32, 32), {})
    block = norms + attention + mlp
    assert [cell.parameters() for cell in net.cells] == [first + block] + [block] * 6
    assert [cell.out_shape for cell in net.cells] == [(65, 384)] * 7
    bare = open_net(f"{PAPER};bias=0;tokens=mean", (3, 32, 32), {})
    assert bare.cells[1].parameters() == norms + 384 * 1152 + 384 * 384 + 2 * 384 * 768
    assert bare.cells[0].parameters() - bare.cells[1].parameters() == 3 * 16 * 384 + 64 * 384


@pytest.mark.parametrize(("tokens", "count"), [("class", 7), ("mean", 6), ("flatten", 6)])
def test_latents_are_tokens_whatever_is_read_off_them(tokens: str, count: int) -> None:
    net = open_net(f"{SMALL};tokens={tokens}", (2, 8, 12), {})
    x = torch.rand(3, 2, 8, 12)
    for index, cell in enumerate(net.cells):
        x = cell.materialise(0, index)(x)
        assert tuple(x.shape[1:]) == cell.out_shape == (count, 8)
        assert not cell.couples_batch


def test_a_cell_may_hold_several_blocks_and_the_last_one_fewer() -> None:
    net = open_net("vit:depth=5,width=8,heads=2,patch=4,cell=2,ratio=3", (1, 8, 8), {})
    held = [sum(isinstance(part, Block) for part in cell.skeleton().modules()) for cell in net.cells]
    assert held == [2, 2, 1]
    assert [cell.name for cell in net.cells] == ["patches 4x4, 2 blocks 5x8", "2 blocks 5x8", "block 5x8"]
    assert net.cells[2].skeleton().get_parameter("block0.mlp.0.weight").shape == (24, 8)


def test_signatures_are_equal_for_cells_of_equal_cost() -> None:
    signatures = [
        cell.signature for cell in open_net("vit:depth=7,width=8,heads=2,patch=4,cell=2", (1, 8, 8), {}).cells
    ]
    assert signatures[1] == signatures[2]
    assert len(set(signatures)) == 3


@pytest.mark.parametrize("options", ["", ";dropout=0.1", ";tokens=mean;bias=0"])
def test_cells_run_on_fake_tensors(options: str) -> None:
    with FakeTensorMode():
        for cell in open_net(SMALL + options, (1, 8, 8), {}).cells:
            out = cell.build()(torch.empty(5, *cell.in_shape))
            out.sum().backward()
            assert tuple(out.shape[1:]) == cell.out_shape


# --- specs ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.builds(Sizes, *[st.integers(1, 99_999)] * 6),
    order=st.permutations(["depth", "width", "heads", "patch", "ratio", "cell"]),
)
def test_sizes_read_back_in_any_order(sizes: Sizes, order: list[str]) -> None:
    assert read_sizes(",".join(f"{key}={asdict(sizes)[key]}" for key in order)) == sizes


def test_ratio_and_cell_may_be_left_out() -> None:
    assert read_sizes("depth=7,width=384,heads=12,patch=4") == Sizes(7, 384, 12, 4, 2, 1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=20) | st.text(alphabet="depthwi=,1 40\n", max_size=30))
def test_any_text_for_sizes_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        read_sizes(text)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected each key once"),
        ("7", "expected each key once"),
        ("depth=7", "width, heads, patch missing"),
        ("depth=7,width=8,heads=2", "patch missing"),
        ("depth=7,width=8,heads=2,patch=4,", "expected each key once"),
        ("depth=7,depth=7,width=8,heads=2,patch=4", "'depth=7'; expected each key once"),
        ("depth=0,width=8,heads=2,patch=4", "'depth=0'; expected each key once with a whole number"),
        ("depth=7,width=8,heads=2,patch=4,ratio=1.5", "'ratio=1.5'; expected each key once with a whole number"),
        (
            "depth=7,width=8,heads=2,patch=4,color=3",
            "unknown key 'color'; known: depth, width, heads, patch, ratio, cell",
        ),
        ("depth=7,width=9,heads=2,patch=4", "width 9 cannot be divided among 2 heads"),
        ("depth=7,width=8,heads=2,patch=3", "images of 8x12 cannot be cut into patches of side 3"),
        ("depth=7,width=8,heads=2,patch=8", "images of 8x12 cannot be cut into patches of side 8"),
    ],
)
def test_wrong_sizes_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        open_net(f"vit:{text}", (1, 8, 12), {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_needs_images() -> None:
    with pytest.raises(InputError, match="needs images"):
        open_net(SMALL, (64,), {})
