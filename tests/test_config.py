"""Settings: names, values, precedence, profiles. ``pytest tests/test_config.py``."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgetrain
from edgetrain.config import Settings, find_profile, read_profile, resolve
from edgetrain.errors import InputError

ROOT = Path(edgetrain.__file__).parents[1]
fuzzing = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def profile(folder: Path, content: str | bytes, name: str = "p.toml") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# --- names ------------------------------------------------------------------------------------


def test_an_unknown_setting_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match="unknown setting 'batchsize'; did you mean 'batch_size'"):
        resolve({"batchsize": 4}, None, {})


def test_an_unknown_setting_like_no_other_gets_no_hint() -> None:
    with pytest.raises(InputError) as caught:
        resolve({"zzz": 4}, None, {})
    assert "did you mean" not in str(caught.value)


def test_an_unknown_setting_of_a_profile_is_refused_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p\.toml.*unknown setting 'epoch'; did you mean 'epochs'"):
        resolve({}, profile(tmp_path, "epoch = 3"), {})


def test_a_wrong_value_whose_message_says_profile_still_names_the_file(tmp_path: Path) -> None:
    path = profile(tmp_path, "profile_name = 'x'")
    with pytest.raises(InputError) as caught:
        resolve({}, path, {})
    assert path in str(caught.value)


def test_a_table_in_a_profile_is_no_setting(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown setting 'mf'"):
        resolve({}, profile(tmp_path, "[mf]\nlr = 0.1"), {})


# --- precedence -------------------------------------------------------------------------------


def test_a_flag_beats_the_environment_beats_a_profile_beats_the_default(tmp_path: Path) -> None:
    path = profile(tmp_path, "epochs = 2\nbatch_size = 20\nseed = 200")
    environment = {"EDGETRAIN_EPOCHS": "3", "EDGETRAIN_BATCH_SIZE": "30"}
    found = resolve({"epochs": 4}, path, environment)
    assert (found.epochs, found.batch_size, found.seed) == (4, 30, 200)
    assert found.net == Settings().net


def test_the_folder_of_known_data_sets_is_no_setting() -> None:
    assert resolve({}, None, {"EDGETRAIN_DATA": "/somewhere"}).data == Settings().data


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETRAIN_EPOCHS", "7")
    assert resolve({}, None).epochs == 7


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("EDGETRAIN_LR", "1e-4", "lr", 1e-4),
        ("EDGETRAIN_MAX_GPU_MB", "512", "max_gpu_mb", 512.0),
        ("EDGETRAIN_KEEP_LATENTS", "1", "keep_latents", True),
        ("EDGETRAIN_KEEP_LATENTS", "False", "keep_latents", False),
        ("EDGETRAIN_MICRO_BATCH", "16", "micro_batch", 16),
        ("EDGETRAIN_SCHEDULE", "sequence", "schedule", "sequence"),
        ("EDGETRAIN_NET", "mlp:4", "net", "mlp:4"),
    ],
)
def test_environment_texts_become_values(variable: str, text: str, name: str, value: Any) -> None:
    found = getattr(resolve({}, None, {variable: text}), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("EDGETRAIN_LR", "fast"),
        ("EDGETRAIN_EPOCHS", "2.5"),
        ("EDGETRAIN_EPOCHS", ""),
        ("EDGETRAIN_EPOCHS", "9" * 5000),
        ("EDGETRAIN_KEEP_LATENTS", "maybe"),
        ("EDGETRAIN_SCHEDULE", "sideways"),
        ("EDGETRAIN_LR", "nan"),
        ("EDGETRAIN_MAX_GPU_MB", "inf"),
        ("EDGETRAIN_MAX_GPU_MB", "-1"),
    ],
)
def test_a_wrong_environment_text_is_one_line_that_names_the_setting(variable: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve({}, None, {variable: text})
    said = str(caught.value)
    assert "\n" not in said
    assert variable in said or f"--{variable.removeprefix('EDGETRAIN_').lower().replace('_', '-')}" in said


# --- values -----------------------------------------------------------------------------------

COUNTS = ["epochs", "batch_size", "classifier_epochs", "threads", "micro_batch", "cells", "views"]
NOT_NEGATIVE = ["weight_decay", "classifier_weight_decay", "checkpoint_every"]
POSITIVE = ["lr", "classifier_lr", "max_gpu_mb", "max_host_mb", "max_disk_gb"]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", math.nan, math.inf, [], {}])
def test_counts_are_whole_and_at_least_one(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is "):
        Settings().with_values({name: value})


@pytest.mark.parametrize("value", [[0], [4, -1], [True], [2.0], ["4"], [[4]], [None]])
def test_listed_micro_batches_are_whole_and_at_least_one(value: Any) -> None:
    with pytest.raises(InputError, match="--micro-batch is"):
        Settings().with_values({"micro_batch": value})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
@pytest.mark.parametrize("value", [-1e-9, -1, math.nan, math.inf, -math.inf, True, "0.1"])
def test_decays_and_intervals_are_finite_and_not_negative(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is "):
        Settings().with_values({name: value})
    assert getattr(Settings().with_values({name: 0}), name) == 0.0


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, math.inf, -math.inf, False, "0.1"])
def test_rates_and_limits_are_finite_and_positive(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is "):
        Settings().with_values({name: value})


@pytest.mark.parametrize("name", [*POSITIVE, *NOT_NEGATIVE])
def test_a_whole_number_may_stand_for_a_float(name: str) -> None:
    found = getattr(Settings().with_values({name: 3}), name)
    assert found == 3.0
    assert type(found) is float


@pytest.mark.parametrize("name", [*POSITIVE, *NOT_NEGATIVE])
def test_a_number_beyond_all_floats_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        Settings().with_values({name: 10**400})


@pytest.mark.parametrize("value", [-1, 1 << 63, 1 << 80, 1.0, True, "0"])
def test_a_seed_is_a_whole_number_below_2_to_the_63(value: Any) -> None:
    with pytest.raises(InputError, match="seed is"):
        Settings().with_values({"seed": value})


def test_the_greatest_seed_is_taken() -> None:
    assert Settings().with_values({"seed": (1 << 63) - 1}).seed == (1 << 63) - 1


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("schedule", "sequenc", "sequence"),
        ("optimizer", "adamm", "adam"),
        ("latent_dtype", "float23", "float32"),
        ("placement", "streem", "stream"),
        ("meter", "ful", "full"),
    ],
)
def test_a_misspelt_choice_gets_a_hint(name: str, value: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{hint}'"):
        Settings().with_values({name: value})


@pytest.mark.parametrize(
    "name", ["schedule", "optimizer", "latent_dtype", "net", "data", "keep_latents", "constants", "augment"]
)
@pytest.mark.parametrize("value", [3, 0.5, ["sequence"], {"a": 1}])
def test_text_and_switches_take_no_numbers_lists_or_tables(name: str, value: Any) -> None:
    with pytest.raises(InputError):
        Settings().with_values({name: value})


# --- profiles ---------------------------------------------------------------------------------

finite = {"allow_nan": False, "allow_infinity": False}
some = st.builds(
    dict,
    data=st.text(),
    net=st.none() | st.text(),
    cells=st.none() | st.integers(1, 1 << 62),
    method=st.text(),
    constants=st.none() | st.text(),
    like=st.none() | st.text(),
    schedule=st.sampled_from([None, "separate", "sequence"]),
    epochs=st.integers(1, 1 << 62),
    batch_size=st.integers(1, 1 << 62),
    micro_batch=st.none() | st.integers(1, 1 << 40) | st.lists(st.integers(1, 99), min_size=1, max_size=4),
    optimizer=st.sampled_from([None, "adam", "adamw", "adamax", "sgd"]),
    lr=st.none() | st.floats(min_value=0, exclude_min=True, **finite),
    weight_decay=st.none() | st.floats(min_value=0, **finite),
    augment=st.none() | st.text(),
    views=st.none() | st.integers(1, 1 << 62),
    seed=st.integers(0, (1 << 63) - 1),
    max_gpu_mb=st.none() | st.floats(min_value=0, exclude_min=True, max_value=1e12),
    keep_latents=st.booleans(),
    prefetch=st.integers(0, 9),
    checkpoint_every=st.none() | st.floats(min_value=0, **finite),
)


@fuzzing
@given(values=some)
def test_settings_written_as_a_profile_read_back_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    first = Settings().with_values(values)
    path = profile(tmp_path, first.to_toml())
    assert resolve({}, path, {}) == first


@fuzzing
@given(content=st.binary(max_size=200))
def test_bytes_for_a_profile_give_settings_or_an_input_error(content: bytes, tmp_path: Path) -> None:
    path = profile(tmp_path, content)
    try:
        resolve({}, path, {})
    except InputError as error:
        assert path in str(error)


toml_values = st.recursive(
    st.sampled_from(["1", "-1", "0.5", "nan", "inf", "true", "''", "'mf'", "1979-05-27", "0x10", "1e999"]),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
    max_leaves=6,
)


@fuzzing
@given(name=st.sampled_from(sorted(Settings.__dataclass_fields__)), value=toml_values)
def test_any_toml_value_of_a_setting_is_taken_or_refused_in_one_line(name: str, value: str, tmp_path: Path) -> None:
    path = profile(tmp_path, f"{name} = {value}")
    try:
        resolve({}, path, {})
    except InputError as error:
        assert path in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content",
    [
        "lr = " + "9" * 400,
        "epochs = " + "9" * 5000,
        "micro_batch = " + "[" * 3000,
        "micro_batch = " + "[" * 3000 + "]" * 3000,
        "\0",
        b"\xff\xfe",
        "a" * 4000,
    ],
    ids=["huge lr", "5000 digits", "open brackets", "nested brackets", "nul", "utf-16 mark", "one long word"],
)
def test_a_malicious_profile_is_an_input_error(content: str | bytes, tmp_path: Path) -> None:
    path = profile(tmp_path, content)
    with pytest.raises(InputError):
        resolve({}, path, {})


def test_an_oversize_profile_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        read_profile(path)


@pytest.mark.parametrize("name", ["missing.toml", "", "a" * 300 + ".toml"])
def test_a_profile_that_cannot_be_opened_is_an_input_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="profile"):
        read_profile(tmp_path / name)


def test_an_unknown_profile_name_is_an_input_error() -> None:
    with pytest.raises(InputError, match="unknown profile 'no-such-profile'"):
        find_profile("no-such-profile")


@fuzzing
@given(name=st.text(max_size=30))
def test_any_profile_name_gives_a_profile_or_an_input_error(name: str) -> None:
    try:
        read_profile(find_profile(name))
    except InputError as error:
        assert "profile" in str(error)


def test_a_profile_is_read_as_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = profile(tmp_path, "data = 'données.npz'")
    code = "import sys; from edgetrain.config import resolve; print(ascii(resolve({}, sys.argv[1], {}).data))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, path]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert found.stdout.strip() == ascii("données.npz"), found.stderr[-300:]
