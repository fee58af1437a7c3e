"""Nets by their specs, and the user's own. ``pytest tests/nets/test_specs_of_nets.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edgetrain
from edgetrain.baselines.backprop import Backpropagation
from edgetrain.errors import InputError
from edgetrain.nets.base import CellRecipe, Net
from edgetrain.nets.layers import STANDARD
from edgetrain.nets.mlp import widths
from edgetrain.nets.spec import NETS, open_net
from edgetrain.objectives.base import Objective, nodes
from edgetrain.objectives.lbp import AutoencoderCells
from edgetrain.objectives.mf import MonoForward

ROOT = Path(edgetrain.__file__).parents[1]
fuzzing = settings(max_examples=150, deadline=None, derandomize=True)
small = st.integers(1, 999)


# --- widths -----------------------------------------------------------------------------------


@fuzzing
@given(given_widths=st.lists(small, min_size=1, max_size=9))
def test_listed_widths_read_back(given_widths: list[int]) -> None:
    assert widths(",".join(map(str, given_widths))) == given_widths


@fuzzing
@given(width=small, count=small)
def test_repeated_widths_read_back(width: int, count: int) -> None:
    assert widths(f"{width}x{count}") == [width] * count


@fuzzing
@given(width=small, count=st.integers(1, 40))
def test_halved_widths_halve_until_they_cannot(width: int, count: int) -> None:
    found = widths(f"{width}/{count}")
    assert len(found) == count
    assert found[0] == width
    assert all(after == max(1, before // 2) for before, after in zip(found, found[1:], strict=False))


nearly = st.text(alphabet="0123456789x/,;:=-. \n٣", max_size=12)


@fuzzing
@given(text=nearly | st.text(max_size=12))
def test_any_text_for_widths_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        found = open_net(f"mlp:{text}", (4,), {})
    except InputError as error:
        assert "mlp:" in str(error)
    else:
        assert all(cell.width >= 1 for cell in found.cells)


@fuzzing
@given(
    spec=st.text(max_size=20)
    | st.tuples(st.sampled_from([*NETS]), nearly | st.text(max_size=9)).map(":".join)
    | st.tuples(st.sampled_from(["mlp:4", "cnn:4;dropout", "mlp:4;embedding"]), nearly | st.text(max_size=9)).map(
        "=".join
    )
)
def test_any_text_for_a_net_is_read_or_an_input_error_of_one_line(spec: str) -> None:
    try:
        found = open_net(spec, (1, 8, 8), {})
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert len(found.cells) >= 1


@pytest.mark.parametrize("text", ["", "0", "-3", "10x0", "0x3", "8/0", "4,,4", "4,", "1e3", " 4", "4x2x2", "٣"])
def test_widths_that_are_none_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"expected mlp:1000x2"):
        open_net(f"mlp:{text}", (4,), {})


# --- options ----------------------------------------------------------------------------------


def test_options_of_the_spec_beat_the_methods() -> None:
    net = open_net("mlp:5;bias=1;prenorm=layer", (4,), {"bias": "0", "pool": "avg"})
    assert net.options == {**STANDARD, "bias": "1", "pool": "avg", "prenorm": "layer"}
    assert net.cells[0].parameters() == 4 * 5 + 5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mlp:4;bias=2", "bias='2'; expected one of 0, 1"),
        ("mlp:4;color=red", "unknown option 'color'; known: bias, pool, norm, prenorm"),
        ("mlp:4;bias", "option 'bias'; expected option=value"),
        ("mlp:4;prenorm=group", "prenorm='group'; expected one of none, layer, rms"),
        ("mlp:4;odd=ceil", "odd='ceil'; expected one of floor, pad"),
        ("mlp:4;act=gelu", "act='gelu'; expected one of relu, leaky"),
        ("mlp:4;tokens=all", "tokens='all'; expected one of flatten, class, mean"),
        *(
            (f"mlp:4;dropout={bad}", "expected a number from 0 to below 1")
            for bad in ("1", "-0.1", "1.5", "nan", "", "x")
        ),
        *((f"mlp:4;embedding={bad}", "expected a whole number from 1 on") for bad in ("0", "-3", "2.5", "", "wide")),
        ("mlp:4;", "expected option=value"),
        ("vgg99:4", "unknown net 'vgg99:4'; expected mlp:"),
        ("", "unknown net ''"),
        ("cnn:4", "needs images"),
        ("missing.py:build", "no file missing.py"),
        ("missing.py", "no file"),
        ("missing.py:build;bias=1", "options are for built-in nets"),
    ],
)
def test_a_wrong_spec_says_what_was_expected(spec: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        open_net(spec, (4,), {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pooling_that_runs_out_of_pixels_is_refused_with_the_number_of_cells_that_fit() -> None:
    assert len(open_net("cnn:4,4,4", (1, 8, 9), {}).cells) == 3
    with pytest.raises(InputError, match="8x9 can be halved 3 times, not 4: use at most 3 cells"):
        open_net("cnn:4,4,4,4", (1, 8, 9), {})


def test_an_unknown_net_is_told_of_every_family() -> None:
    with pytest.raises(InputError) as caught:
        open_net("resnet:18", (3, 32, 32), {})
    assert all(f" {family}" in str(caught.value) for family in NETS)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("spec", [family.example for family in NETS.values()])
def test_every_example_is_a_net(spec: str) -> None:
    assert len(open_net(spec, (3, 32, 32), {}).cells) >= 1


VIT = "vit:depth=2,width=8,heads=2,patch=4"


def test_a_familys_own_options_stand_between_the_standard_and_the_methods() -> None:
    assert open_net("mlp:4", (1, 8, 8), {}).options["tokens"] == "flatten"
    assert open_net(VIT, (1, 8, 8), {"bias": "0"}).options["tokens"] == "class"
    assert open_net(VIT, (1, 8, 8), {"tokens": "mean"}).options["tokens"] == "mean"
    assert open_net(f"{VIT};tokens=flatten", (1, 8, 8), {"tokens": "mean"}).options["tokens"] == "flatten"


@pytest.mark.parametrize("net", [None, 3, 2.5])
def test_what_is_no_net_is_refused(net: Any) -> None:
    with pytest.raises(InputError, match="expected a spec"):
        open_net(net, (4,), {})


# --- shapes and parameter counts --------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    side=st.integers(8, 13),
    bias=st.sampled_from("01"),
    pool=st.sampled_from(["avg", "max"]),
    norm=st.sampled_from(["none", "batch"]),
    prenorm=st.sampled_from(["none", "layer"]),
)
def test_cells_give_the_shapes_that_their_recipes_promise(
    channels: list[int], side: int, bias: str, pool: str, norm: str, prenorm: str
) -> None:
    spec = f"cnn:{','.join(map(str, channels))};bias={bias};pool={pool};norm={norm};prenorm={prenorm}"
    net = open_net(spec, (2, side, side + 1), {})
    x = torch.zeros(3, *net.in_shape)
    for index, cell in enumerate(net.cells):
        assert cell.in_shape == tuple(x.shape[1:])
        module = cell.materialise(0, index)
        x = module(x)
        assert tuple(x.shape[1:]) == cell.out_shape
        assert sum(value.numel() for value in module.parameters()) == cell.parameters()
        assert cell.couples_batch == (norm == "batch")
        assert (x >= 0).all()


def learned(net: Net, method: type[Objective], classes: int) -> list[tuple[int, int]]:
    """(cell's, head's) learned numbers of each trained cell."""
    objective = method(classes, net.options)
    found = []
    with torch.device("meta"):
        for node in nodes(objective.join(list(net.cells)), net.in_shape, 0):
            head = objective.head(node)
            assert node.recipe is not None
            size = 0 if head is None else sum(value.numel() for value in head.parameters())
            found.append((node.recipe.parameters(), size))
    return found


def test_mono_forward_has_the_parameters_of_its_paper() -> None:
    net = open_net("mlp:1000x2", (1, 28, 28), MonoForward.net_defaults)
    counts = learned(net, MonoForward, 10)
    assert sum(map(sum, counts)) == 1_804_000
    assert sum(cell for cell, _ in counts) == 1_784_000
    assert sum(cell for cell, _ in counts) + counts[-1][1] == 1_794_000


def test_local_back_propagation_has_the_parameters_of_its_paper() -> None:
    net = open_net("mlp:1024/5", (3, 32, 32), AutoencoderCells.net_defaults)
    latents = sum(cell.width for cell in net.cells)
    assert [cell.width for cell in net.cells] == [1024, 512, 256, 128, 64]
    assert sum(map(sum, learned(net, AutoencoderCells, 100))) + latents * 100 + 100 == 7_889_572


def test_the_baselines_of_that_paper_have_its_parameters() -> None:
    mlp = open_net("mlp:1024x6", (3, 32, 32), AutoencoderCells.net_defaults)
    assert sum(map(sum, learned(mlp, Backpropagation, 100))) == 8_497_252
    cnn = open_net("cnn:64,128,256,512,1024;bias=1;pool=max", (3, 32, 32), {})
    assert sum(map(sum, learned(cnn, Backpropagation, 100))) == 6_373_092


def cells_and_classifier(net: Net) -> int:
    """Learned numbers of the cells and of a linear map to 100 classes with bias."""
    return sum(cell.parameters() for cell in net.cells) + net.cells[-1].width * 100 + 100


def test_cells_have_the_parameters_of_the_papers_baselines() -> None:
    shape = (3, 32, 32)
    assert cells_and_classifier(open_net("cnn:64,128,256,512,1024", shape, {"bias": "1"})) == 6_373_092
    assert cells_and_classifier(open_net("mlp:1024x6", shape, {})) == 8_497_252


# --- laziness and weights ---------------------------------------------------------------------

LAZY = """
import json, resource, time, tracemalloc
import torch
from edgetrain.memory.host import rss_bytes
from edgetrain.nets.spec import open_net
before, start = rss_bytes(), time.perf_counter()
tracemalloc.start()
net = open_net("mlp:10000x1000", (784,), {})
seconds, traced = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
params = net.cells[500].parameters()
print(json.dumps([len(net.cells), seconds, traced, rss_bytes() - before, params]))
"""


def test_describing_400_gigabytes_of_net_takes_no_memory_and_no_time() -> None:
    found = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True, cwd=ROOT)
    cells, seconds, traced, resident, params = json.loads(found.stdout)
    assert cells == 1000
    assert params == 10_000 * 10_000 + 10_000
    assert seconds < 2
    assert traced < 4 << 20
    assert resident < 40 << 20


def weights(cell: CellRecipe, seed: int, index: int) -> torch.Tensor:
    return torch.cat([value.flatten() for value in cell.materialise(seed, index).state_dict().values()])


@pytest.mark.parametrize(
    "spec", ["mlp:7x3", "cnn:7,7,7", "lcmlp:3,3,3", "vgg8b:0.05", "vit:depth=3,width=8,heads=2,patch=4"]
)
def test_weights_are_keyed_by_seed_and_cell(spec: str) -> None:
    net = open_net(spec, (7, 16, 16), {})
    last, again = net.cells[2], open_net(spec, (7, 16, 16), {}).cells[2]
    first = weights(last, 1, 2)
    torch.manual_seed(99)
    assert torch.equal(first, weights(again, 1, 2))
    assert not torch.equal(first, weights(last, 2, 2))
    assert not torch.equal(first, weights(last, 1, 1))


def test_making_a_cell_leaves_the_global_stream_alone() -> None:
    net = open_net("mlp:7x2", (5,), {})
    state = torch.random.get_rng_state()
    net.cells[0].materialise(0, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_equal_cells_have_equal_signatures_and_others_have_not() -> None:
    cells = open_net("mlp:7x3", (7,), {}).cells
    assert cells[0].signature == cells[1].signature == cells[2].signature
    others = [
        *(open_net(f"mlp:7;{option}", (7,), {}) for option in ("act=leaky", "dropout=0.5", "prenorm=layer")),
        open_net("mlp:8", (7,), {}),
        open_net("mlp:7", (8,), {}),
        open_net("mlp:7;bias=0", (7,), {}),
        open_net("mlp:7;norm=batch", (7,), {}),
        open_net("cnn:7", (7, 2, 2), {}),
        open_net("lcmlp:3", (7, 2, 2), {}),
        open_net("vgg8b", (7, 2, 2), {}),
    ]
    assert len({cells[0].signature, *(net.cells[0].signature for net in others)}) == 11


# --- the user's own nets ----------------------------------------------------------------------


def layers() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, 4)]


def stepwise() -> Iterator[nn.Module]:
    yield from layers()


def stacked() -> nn.Sequential:
    return nn.Sequential(*layers())


@pytest.mark.parametrize("build", [layers, stepwise, stacked])
def test_a_function_gives_a_net_whose_every_cell_is_of_the_same_build(build: Any) -> None:
    net, same, other_seed = (open_net(build, (6,), {}, seed=seed) for seed in (3, 3, 4))
    assert [cell.out_shape for cell in net.cells] == [(5,), (4,), (4,)]
    made = [cell.materialise(3, index) for index, cell in enumerate(net.cells)]
    again = [cell.materialise(3, index) for index, cell in enumerate(same.cells)]
    for one, other in zip(made, again, strict=True):
        assert all(torch.equal(one.state_dict()[name], other.state_dict()[name]) for name in one.state_dict())
    flat = [value.flatten()[:4] for module in made for value in module.parameters() if value.ndim == 2]
    assert not any(torch.equal(flat[0], other) for other in flat[1:])
    assert not torch.equal(weights(net.cells[1], 3, 1), weights(other_seed.cells[1], 4, 1))


@pytest.mark.parametrize("wrap", [list, tuple, lambda modules: nn.Sequential(*modules), nn.ModuleList])
def test_modules_that_exist_keep_their_values_and_are_copied(wrap: Any) -> None:
    given_modules = layers()
    net = open_net(wrap(given_modules), (6,), {})
    for index, cell in enumerate(net.cells):
        made = cell.materialise(index, index)
        for name, value in given_modules[index].state_dict().items():
            assert torch.equal(made.state_dict()[name], value)
            assert made.state_dict()[name].data_ptr() != value.data_ptr()


def test_skeletons_of_modules_that_exist_hold_no_values() -> None:
    given_modules = [nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))]
    cell = open_net(given_modules, (6,), {}).cells[0]
    assert all(value.is_meta for value in cell.skeleton().state_dict().values())
    assert not any(value.is_meta for value in given_modules[0].state_dict().values())
    assert cell.couples_batch


def net_file(folder: Path, text: str) -> str:
    (folder / "my_net.py").write_text(text)
    return f"{folder / 'my_net.py'}:build"


NET = "from torch import nn\ndef build():\n    return [nn.Linear(6, 5), nn.Linear(5, 2)]\n"


def test_a_file_gives_a_net(tmp_path: Path) -> None:
    net = open_net(net_file(tmp_path, NET), (6,), {})
    assert [cell.out_shape for cell in net.cells] == [(5,), (2,)]
    assert net.spec.endswith("my_net.py:build")


def test_a_file_may_use_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "@dataclass\nclass Sizes:\n    width: int = 5\n"
        "def build():\n    return [nn.Linear(6, Sizes().width)]\n"
    )
    assert len(open_net(net_file(tmp_path, text), (6,), {}).cells) == 1


BROKEN_FILES = {
    "syntax": "def build(:\n",
    "import": "import no_such_module_of_mine\n",
    "fails": "raise RuntimeError('two\\nlines')\n",
    "no function": "x = 1\n",
    "no callable": "build = 3\n",
}


@pytest.mark.parametrize("kind", list(BROKEN_FILES))
def test_a_broken_file_is_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    assert_one_line(net_file(tmp_path, BROKEN_FILES[kind]), "my_net.py")


def none() -> None:
    return None


def failing() -> list[nn.Module]:
    raise RuntimeError("no such\ncheckpoint")


def one_module() -> nn.Module:
    return nn.Linear(6, 5)


def needs_arguments(width: int) -> list[nn.Module]:
    return [nn.Linear(6, width)]


def assert_one_line(net: Any, word: str) -> None:
    with pytest.raises(InputError) as caught:
        open_net(net, (6,), {})
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", [none, failing, one_module, needs_arguments])
def test_a_function_that_gives_no_modules_is_one_line_that_names_it(build: Any) -> None:
    assert_one_line(build, build.__name__)


def test_a_single_module_that_is_no_chain_is_refused() -> None:
    assert_one_line(nn.Linear(6, 5), "Linear")


@pytest.mark.parametrize("net", [[], nn.Sequential(), [nn.Linear(6, 5), "relu"], lambda: [3]])
def test_a_list_without_modules_is_refused(net: Any) -> None:
    assert_one_line(net, "odules")


def test_modules_that_do_not_fit_each_other_are_refused_by_number() -> None:
    assert_one_line([nn.Linear(6, 5), nn.Linear(4, 3)], "cell 2 (Linear) fails on rows of shape (5,)")


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Total(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


@pytest.mark.parametrize("module", [Two(), Total()])
def test_a_module_must_give_one_tensor_with_rows(module: nn.Module) -> None:
    assert_one_line([module], f"cell 1 ({type(module).__name__}) must return one tensor")


def test_the_elements_of_a_cell_are_those_of_its_shape() -> None:
    cell = open_net("cnn:6", (1, 8, 8), {}).cells[0]
    assert cell.width == prod(cell.out_shape) == 96
