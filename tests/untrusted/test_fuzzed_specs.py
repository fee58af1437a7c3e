"""Untrusted text for a net, data, constants, a device or a profile is read, or refused in one line.

``pytest tests/untrusted/test_fuzzed_specs.py``; ``EDGETRAIN_EXAMPLES=1000`` tries more.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_attacks import MIB, NUMBERS, fuzzing, nested, odd_values, ours, refused, spliced

from edgetrain.config import Settings, find_profile, read_profile, resolve
from edgetrain.data import specs
from edgetrain.data.augment import Augmentation
from edgetrain.errors import InputError
from edgetrain.memory import device as devices
from edgetrain.nets.base import MOST_CELLS
from edgetrain.nets.spec import NETS, open_net
from edgetrain.training.job import constants_of
from edgetrain.training.methods import METHODS

FIELDS = sorted(Settings.__dataclass_fields__)
SHAPES = [(1,), (4,), (1, 1, 1), (1, 8, 8), (3, 7, 5), (3, 32, 32)]
ODD = ["", " ", "\n", "\0", "\x1b[2J", "\ud800", "٣", "é", "nan", "inf", "-1", "1e999", "9" * 5000, "0x10", "1_0"]
numbers = st.integers(0, 99).map(str) | st.sampled_from(NUMBERS).map(str) | st.sampled_from(ODD)
shape_texts = st.lists(numbers | st.sampled_from(list("x/,:;=.")), max_size=7).map("".join) | st.builds(
    "depth={},width={},heads={},patch={},ratio={},cell={}".format, *[numbers] * 6
)
OPTIONS = ["bias", "pool", "norm", "prenorm", "odd", "act", "dropout", "tokens", "embedding", "__class__", *ODD[:7]]
VALUES = ["0", "1", "avg", "max", "batch", "layer", "rms", "pad", "leaky", "class", "mean", ".5", ".999999999", *ODD]
option_texts = st.lists(
    st.tuples(st.sampled_from(OPTIONS), st.sampled_from(["=", "=", "=", "", "=="]), st.sampled_from(VALUES)).map(
        "".join
    ),
    max_size=3,
)
valid_nets = st.sampled_from(
    ["mlp:10x3", "mlp:7,5", "mlp:9/4", "cnn:4", "lcmlp:1,2", "vgg8b:0.1", "vit:depth=3,width=4,heads=2,patch=1"]
)
net_specs = (
    st.builds(lambda net, options: ";".join([net, *options]), valid_nets, option_texts)
    | st.builds("{}:{}".format, st.sampled_from([*NETS, "MLP", "", "x.py", "\0.py", "a" * 300 + ".py"]), shape_texts)
    | st.text(st.characters(), max_size=12)
)


@fuzzing(200)
@given(spec=net_specs, shape=st.sampled_from(SHAPES), vocabulary=st.sampled_from([None, None, 5, 20_002]))
def test_a_net_is_read_or_refused(spec: str, shape: tuple[int, ...], vocabulary: int | None) -> None:
    net = ours(lambda: open_net(spec, shape, {}, vocabulary), "net ")
    if net is None:
        return
    assert 1 <= len(net.cells) <= MOST_CELLS + 1
    for cell in (net.cells[0], net.cells[-1]):
        assert cell.parameters() >= 0
        assert all(side >= 1 for side in cell.out_shape)


@fuzzing(100)
@given(widths=st.lists(st.integers(1, 9999), min_size=1, max_size=5), bias=st.sampled_from("01"))
def test_a_net_as_the_documentation_writes_it_is_read(widths: list[int], bias: str) -> None:
    net = open_net(f"mlp:{','.join(map(str, widths))};bias={bias}", (3, 2, 2), {})
    assert [cell.out_shape for cell in net.cells] == [(width,) for width in widths]
    assert net.cells[0].parameters() == (12 + int(bias)) * widths[0]


@pytest.mark.parametrize(
    "spec",
    [
        "mlp:10x1000000000",
        "mlp:99999999999999999999",
        f"mlp:10x{MOST_CELLS + 1}",
        "mlp:1024/999999",
        "cnn:4x999999",
        "lcmlp:4x999999",
        "vit:depth=999999,width=4,heads=2,patch=4",
        "mlp:" + "9" * 5000,
        "mlp:4;dropout=0." + "9" * 5000,
        "mlp:4" + ";bias=1" * 50_000 + ";x",
        "a" * 5000 + ".py:build",
        "x.py:" + "build." * 20_000,
    ],
    ids=lambda spec: spec[:40],
)
def test_an_absurd_net_is_refused_before_anything_is_made(spec: str) -> None:
    refused(lambda: open_net(spec, (1, 8, 8), {}), InputError, "^(unknown )?net ", 32 * MIB)


def test_a_net_of_too_many_listed_widths_is_refused() -> None:
    spec = "mlp:" + ",".join(["1"] * (MOST_CELLS + 1))
    refused(lambda: open_net(spec, (4,), {}), InputError, f"at most {MOST_CELLS} cells", 32 * MIB)


@pytest.mark.parametrize("spec", ["mlp:999999999", "mlp:999999999,999999999", "cnn:999999999,999999999"])
def test_what_a_cell_would_take_can_be_reckoned_however_wide_it_is(spec: str) -> None:
    net = ours(lambda: open_net(spec, (3, 32, 32), {}), "net ")
    assert net is None or all(cell.parameters() > 0 for cell in net.cells)


@pytest.mark.slow
def test_a_deep_net_is_read() -> None:
    assert len(open_net("mlp:10000x1000", (784,), {}).cells) == 1000
    assert len(open_net(f"mlp:10x{MOST_CELLS}", (784,), {}).cells) == MOST_CELLS


@fuzzing(100)
@given(
    text=st.lists(st.sampled_from(["crop", "flip", "cutout", "crop ", *ODD]), max_size=4).map(",".join)
    | st.text(st.characters(), max_size=9),
    shape=st.sampled_from(SHAPES),
)
def test_augmentations_are_read_or_refused(text: str, shape: tuple[int, ...]) -> None:
    found = ours(lambda: Augmentation.parse(text, shape), "--augment ")
    if found is not None:
        names = [name.strip() for name in text.split(",")]
        assert list(found.names) == names
        assert found(torch.ones(2, *shape), torch.rand(2, found.columns)).shape == (2, *shape)


@fuzzing(150)
@given(
    method=st.sampled_from(sorted(METHODS)),
    pieces=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["=", "=", "", "=="]), numbers), max_size=3),
    noise=st.sampled_from(["", "", ",", "=", "x=1", "\ud800=1", " = = "]),
)
def test_constants_are_read_or_refused(method: str, pieces: list[tuple[int, str, str]], noise: str) -> None:
    known = sorted(METHODS[method].constants) or ["none"]
    text = ",".join([*(f"{known[number % len(known)]}{sign}{value}" for number, sign, value in pieces), noise])
    try:
        settings = Settings().with_values({"constants": text})
    except InputError as error:
        assert str(error).isprintable()
        return
    found = ours(lambda: constants_of(settings, METHODS[method]), "--constants ")
    assert found is None or all(value >= 0 and isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", ["auto", "cpu", " CPU "])
def test_a_device_that_is_there_is_found(name: str) -> None:
    assert devices.resolve(name).type in ("cpu", "cuda")


@fuzzing(150)
@given(name=spliced(["cuda", ":", "cpu", "auto", "mps", "0", "1", *ODD]) | st.text(st.characters(), max_size=9))
def test_a_device_is_found_or_refused(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "is_initialized", lambda: False)
        found = ours(lambda: devices.resolve(name), "--device ")
    assert found is None or found.type == "cpu" or found.index in (0, 1)


PATHS = [
    ".npz",
    "/",
    "~",
    "~no-such-user",
    "..",
    "a",
    "A" * 300,
    "mnist",
    "digits",
    ":",
    "/dev/null",
    "/dev/zero",
    *ODD,
]


@pytest.mark.parametrize("opener", [specs.open_data, specs.open_rows])
@fuzzing(150)
@given(text=spliced(PATHS) | st.text(st.characters(), max_size=9), ending=st.sampled_from(["", ".npz", ".NPZ"]))
def test_a_data_spec_that_names_nothing_is_refused(opener: Any, text: str, ending: str) -> None:
    spec = text + ending
    if spec not in specs.NAMES:
        assert ours(lambda: opener(spec), "") is None


@pytest.mark.parametrize("variable", ["EDGETRAIN_DATA", "XDG_CACHE_HOME"])
@fuzzing(60)
@given(
    text=st.text(st.characters(exclude_characters="\0"), max_size=6) | spliced(PATHS).filter(lambda t: "\0" not in t)
)
def test_a_folder_that_the_environment_names_is_looked_into_or_refused(variable: str, text: str) -> None:
    def fetched(known: Any) -> Path:
        raise InputError("would be downloaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgetrain.data.fetch.fetch", fetched)
        patch.setenv("EDGETRAIN_DATA", "")
        patch.setenv(variable, text.encode("utf-8", "replace").decode())
        assert ours(lambda: specs.open_data("cifar10"), "") is None


# --- settings and profiles ----------------------------------------------------------------------


def written_and_read(settings: Settings, folder: Path) -> Settings:
    path = folder / "config.toml"
    path.write_bytes(settings.to_toml().encode())
    return resolve({}, str(path), {})


@fuzzing(300)
@given(name=st.sampled_from(FIELDS), value=odd_values | st.sampled_from(VALUES))
def test_any_value_of_a_setting_is_refused_or_survives_a_profile(name: str, value: Any, tmp_path: Path) -> None:
    found = ours(lambda: Settings().with_values({name: value}), f"--{name.replace('_', '-')}")
    if found is not None:
        assert written_and_read(found, tmp_path) == found


@fuzzing(200)
@given(name=st.sampled_from(FIELDS), text=numbers | st.sampled_from(VALUES) | st.text(st.characters(), max_size=6))
def test_any_text_of_the_environment_is_refused_or_survives_a_profile(name: str, text: str, tmp_path: Path) -> None:
    found = ours(lambda: resolve({}, None, {f"EDGETRAIN_{name.upper()}": text}), "")
    if found is not None:
        assert written_and_read(found, tmp_path) == found


TOML = [
    *("data", "net", "seed", "lr", "micro_batch", "plan", "keep_latents", " = ", ".", ",", "[", "]", "[[", "]]"),
    *("{", "}", '"', "'", "'''", '"""', "\n", "\r", "#", "\\u0041", "\\ud800", "\\UFFFFFFFF", "true", "nan", "+inf"),
    *("0x" + "f" * 5000, "0b" + "1" * 99, "9" * 5000, "1e999", "-0", "1_0", "1979-05-27", "25:61:61", "\0", "\ufeff"),
    *("1979-05-27T00:00:00+99:99", "0001-01-01T00:00:00+23:59"),
]
toml_lines = st.lists(
    st.builds(lambda name, tail: f"{name} = {tail}", st.sampled_from(FIELDS), spliced(TOML, 4)) | spliced(TOML, 8),
    max_size=4,
)


@fuzzing(300)
@given(lines=toml_lines)
def test_any_toml_is_read_or_refused_by_the_name_of_its_file(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes("\n".join(lines).encode())
    found = ours(lambda: resolve({}, str(path), {}), str(path))
    if found is not None:
        assert written_and_read(found, tmp_path) == found


NASTY_PROFILES = {
    "hexadecimal without end": "epochs = 0x" + "f" * 100_000,
    "a seed of 400 digits": "seed = " + "9" * 400,
    "a list of long numbers": "micro_batch = [" + "0x" + "f" * 9000 + "]",
    "lists in lists": "cached = " + "[" * 200 + "]" * 200,
    "tables in tables": "net" + ".a" * 2000 + " = 1",
    "headers in headers": "[net" + ".a" * 2000 + "]\nb = 1",
    "tables in tables without end": "net" + ".a" * 500_000 + " = 1",
    "many tables in tables": "\n".join(f"[a{number}{'.a' * 99}]" for number in range(400)),
    "inline tables": "net = " + "{a = " * 150 + "1" + "}" * 150,
    "a long name": "x" * 900_000 + " = 1",
    "a long word": "method = '" + "x" * 900_000 + "'\nmeter = '" + "x" * 90_000 + "'",
    "control characters": "meter = '\\u001b[2J'\n\"a\\nb\" = 1",
}


@pytest.mark.parametrize("kind", list(NASTY_PROFILES))
def test_a_nasty_profile_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(NASTY_PROFILES[kind])
    refused(lambda: resolve({}, str(path), {}), InputError, f"^profile {path}", 64 * MIB)


def test_lists_in_lists_in_python_are_refused_in_one_line() -> None:
    refused(lambda: Settings().with_values({"tiles": nested(100_000)}), InputError, "^--tiles is", 64 * MIB)


@fuzzing(100)
@given(name=spliced(["..", "/", "a", ".toml", "quickstart", "A" * 300, "/dev/zero", "/proc/self/mem", *ODD]))
def test_any_name_of_a_profile_is_found_or_refused(name: str) -> None:
    ours(lambda: read_profile(find_profile(name)), "profile ")
