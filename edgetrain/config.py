"""Settings: everything that decides a run, as one frozen dataclass; unknown keys are errors.

Precedence: flag, then ``EDGETRAIN_*``, then profile, then the method's defaults. The resolved profile
is written to the run folder; rerunning it gives the same run.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgetrain.errors import InputError, shown
from edgetrain.plugins import is_own

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SIZES = {"max_gpu_mb": "MB", "max_host_mb": "MB", "max_disk_gb": "GB"}  # settings that are sizes, and their units
_OTHER_VARIABLES = ("EDGETRAIN_DATA", "EDGETRAIN_DEBUG", "EDGETRAIN_EXAMPLES", "EDGETRAIN_MIRROR")  # read elsewhere
TABLES = ("plan", "torch")  # of a run's config.toml, which are no settings
_PROFILE_LIMIT = 1 << 20  # bytes; a profile is a page, not a book
_DOTS_LIMIT = 100  # in a line; settings have none, and tomllib's time grows with the square of a name's parts
_SEARCHED = 100  # letters of an unknown word for which a known one is looked for
_NUMBER_LIMIT = 1 << 63  # TOML's whole numbers end here; what has thousands of digits cannot even be shown


def _setting(default: Any, group: str, help: str, flag: bool = True) -> Any:
    """A field with what ``--help`` says of it, and under which heading; ``flag``: whether it is a command line flag."""
    return field(default=default, metadata={"group": group, "help": help, "flag": flag})


_DATA, _MODEL, _TRAINING = "Data", "Network and method", "Training"
_BUDGET, _DEVICE, _RUN = "Budgets", "Device and precision", "Checkpoints and run time"


@dataclass(frozen=True)
class Settings:
    """All settings of a run. ``None`` means: what the method or the machine prefers."""

    data: str = _setting("digits", _DATA, "A known data set (see edgetrain data list), or the path of an ``.npz``")
    input: Literal["image", "table", "tokens", "signal"] | None = _setting(
        None, _DATA, "What the rows of an ``.npz`` are; by default arrays of 2 dims are tables, of 3 and 4 images"
    )
    channels: Literal["first", "last"] | None = _setting(
        None, _DATA, "Which axis of images or signals is the channels; by default it is inferred"
    )
    normalize: str | None = _setting(
        None,
        _DATA,
        "Normalise images by channel: ``data`` (mean and deviation of the training images), ``imagenet``,"
        " ``MEAN,.../STD,...`` or ``none``; the default is ``data``, or ``none`` for rules that reconstruct",
    )
    augment: str | None = _setting(None, _DATA, "Random changes to training images, such as ``crop,flip,cutout``")
    views: int | None = _setting(
        None, _DATA, "Augmented copies of the data that finished cells cache, for ``--schedule separate``"
    )
    validation: float | None = _setting(
        None, _DATA, "Share of the training rows to hold out for ``--vote auto`` and ``--patience``, such as 0.1"
    )
    net: str | None = _setting(
        None, _MODEL, "The network (see edgetrain nets): ``mlp:1000x2``, ``cnn:64,128``, ``path/to/net.py:function``"
    )
    cells: int | None = _setting(None, _MODEL, "Train only the first N cells of the net")
    method: str = _setting(
        "mf", _MODEL, "The learning rule or baseline (see edgetrain methods), or ``path/to/rule.py:Class``"
    )
    constants: str | None = _setting(None, _MODEL, "Constants of the rule, such as ``beta=0.5,dropout=0.1``")
    like: str | None = _setting(
        None, _MODEL, "For baselines: use the net options (biases, pooling, normalisation) of this method"
    )
    vote: Literal["auto"] | None = _setting(
        None, _MODEL, "``auto``: predict by the vote with the highest accuracy on the rows of ``--validation``"
    )
    schedule: Literal["separate", "sequence"] | None = _setting(
        None,
        _TRAINING,
        "``separate``: train each cell to the end before the next; ``sequence``: all cells in every epoch",
    )
    epochs: int = _setting(10, _TRAINING, "Passes over the data for each cell")
    batch_size: int = _setting(128, _TRAINING, "Samples of one optimizer step")
    patience: int | None = _setting(
        None,
        _TRAINING,
        "Stop a cell, or under ``sequence`` and for baselines the run, after N evaluations on the rows of"
        " ``--validation`` without a higher accuracy",
    )
    evaluate_every: int | None = _setting(
        None,
        _TRAINING,
        "Measure the accuracy every N epochs, on the rows of ``--validation`` if there are any, else on the test rows;"
        " with ``--patience`` the default is 1",
    )
    optimizer: Literal["adam", "adamw", "adamax", "sgd"] | None = _setting(
        None, _TRAINING, "Optimizer; the default depends on the method"
    )
    lr: float | None = _setting(None, _TRAINING, "Learning rate; the default depends on the method")
    lr_schedule: str | None = _setting(
        None,
        _TRAINING,
        "``constant``, ``cosine``, ``one-cycle``, ``step:30,60[:0.1]`` or ``linear-warmup[:0.1]``, over the steps of"
        " each cell",
    )
    weight_decay: float | None = _setting(None, _TRAINING, "Weight decay; the default depends on the method")
    momentum: float | None = _setting(None, _TRAINING, "Momentum of ``--optimizer sgd``")
    nesterov: bool = _setting(False, _TRAINING, "Nesterov momentum, for ``--optimizer sgd``")
    betas: str | None = _setting(None, _TRAINING, "Betas of ``adam``, ``adamw`` and ``adamax``, such as ``0.9,0.999``")
    clip_value: float | None = _setting(None, _TRAINING, "Clip each element of the gradients to this magnitude")
    clip_norm: float | None = _setting(
        None, _TRAINING, "Clip the gradients of each cell to this norm; the cell is then not trained in tiles"
    )
    classifier_lr: float | None = _setting(
        None, _TRAINING, "Learning rate of the classifier, for methods that train one on latents"
    )
    classifier_weight_decay: float | None = _setting(None, _TRAINING, "Weight decay of that classifier")
    classifier_epochs: int | None = _setting(
        None, _TRAINING, "Epochs of that classifier; for ff, symba and sll this adds one"
    )
    seed: int = _setting(0, _TRAINING, "Seed of all random numbers")
    max_gpu_mb: float | None = _setting(None, _BUDGET, "Device memory that the run may use, in MiB")
    count_context: bool = _setting(False, _BUDGET, "Count the CUDA context as a part of ``--max-gpu-mb``")
    max_host_mb: float | None = _setting(None, _BUDGET, "Host memory for buffers and waiting cells, in MiB")
    max_disk_gb: float | None = _setting(None, _BUDGET, "Disk space of the run folder, in GiB")
    device: str = _setting("auto", _DEVICE, "``auto``, ``cuda``, ``cuda:1``, ``mps`` or ``cpu``")
    placement: Literal["auto", "stream", "resident"] = _setting(
        "auto",
        _DEVICE,
        "``stream``: one cell on the device at a time; ``resident``: all; ``auto``: resident if a GPU can hold it",
    )
    micro_batch: int | list[int] | None = _setting(
        None, _DEVICE, "Samples on the device at once; a list has one number for each cell and the classifier"
    )
    tiles: int | list[int] | None = _setting(
        None, _DEVICE, "Tiles in which a cell too wide for the device is trained; a list has one number for each cell"
    )
    latent_dtype: Literal["float32", "float16", "bfloat16", "uint8"] = _setting(
        "float32", _DEVICE, "Type of the latents on disk"
    )
    memory_format: Literal["auto", "contiguous", "channels-last"] = _setting(
        "auto",
        _DEVICE,
        "Order of images in memory for cells with overlapping convolutions; ``auto``: ``channels-last`` on the CPU",
    )
    threads: int | None = _setting(None, _DEVICE, "CPU threads; by default as many as PyTorch uses")
    meter: Literal["auto", "full"] = _setting(
        "auto", _DEVICE, "``full``: measure the memory of every step, not only the first two of each kind"
    )
    prefetch: int = _setting(
        2, _DEVICE, "Batches gathered ahead by a thread; 0 turns background reading and writing off", flag=False
    )
    checkpoint_every: float | None = _setting(
        None, _RUN, "Seconds between checkpoints; by default a minute or 5% of the run, whichever is longer"
    )
    time_limit: float | None = _setting(None, _RUN, "Save a checkpoint and stop after this many seconds")
    keep_latents: bool = _setting(False, _RUN, "Keep the latents in the run folder")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            _check_type(setting.name, getattr(self, setting.name), hints[setting.name])
        for name in (
            "epochs", "batch_size", "classifier_epochs", "threads", "cells", "views", "patience", "evaluate_every"
        ):  # fmt: skip
            _check_least(name, getattr(self, name), 1)
        for name, asked in (("micro_batch", self.micro_batch), ("tiles", self.tiles)):
            for value in asked if isinstance(asked, list) else [asked]:
                _check_least(name, value, 1)
        for name in ("weight_decay", "classifier_weight_decay", "momentum", "prefetch", "checkpoint_every", "seed"):
            _check_least(name, getattr(self, name), 0)
        for name in (
            "lr",
            "classifier_lr",
            "clip_value",
            "clip_norm",
            "max_gpu_mb",
            "max_host_mb",
            "max_disk_gb",
            "time_limit",
        ):
            _check_positive(name, getattr(self, name))
        if self.validation is not None and not 0 < self.validation < 1:
            raise InputError(f"--validation is {self.validation}; expected a share above 0 and below 1, such as 0.1")
        for name, limit in (
            ("seed", 1 << 63),
            ("threads", 1 << 12),
            ("max_gpu_mb", 1 << 40),
            ("max_host_mb", 1 << 40),
            ("max_disk_gb", 1 << 40),
        ):
            value = getattr(self, name)
            if value is not None and value >= limit:
                raise InputError(f"{_flag(name)} is {value}; expected less than {limit}")

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """These settings with some replaced.

        Raises:
            InputError: unknown name or wrong value.
        """
        known = [setting.name for setting in fields(self)]
        for name in values:
            if name not in known:
                raise InputError(f"unknown setting {name!r}{did_you_mean(name, known)}")
        return replace(self, **{name: _number(value, name) for name, value in values.items()})

    def to_toml(self) -> str:
        """As a profile."""
        import tomli_w

        return tomli_w.dumps({name: value for name, value in asdict(self).items() if value is not None})


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """A hint at the nearest known word, to be put behind an error's first part."""
    close = difflib.get_close_matches(word[:_SEARCHED], list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_profile(path: Path) -> dict[str, Any]:
    """The values of a profile file.

    Raises:
        InputError: it is missing, no TOML, or too large.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"profile {path}: not a file; expected a short TOML file")
        if path.stat().st_size > _PROFILE_LIMIT:
            raise InputError(f"profile {path}: larger than 1 MiB; expected a short TOML file")
        return parse_profile(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise InputError(f"profile {path}: {error.strerror}") from error
    except ValueError as error:  # no UTF-8, or no path
        raise InputError(f"profile {path}: not valid TOML: {error}") from error


def parse_profile(text: str, path: Path) -> dict[str, Any]:
    """The values of a profile's text, which came from ``path``.

    Raises:
        InputError: it is no TOML.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > _DOTS_LIMIT:
            raise InputError(f"profile {path}: line {number} has more than {_DOTS_LIMIT} dots; settings have none")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"profile {path}: not valid TOML: {error}") from error


def find_profile(name: str) -> Path:
    """The file of a profile given by name or path.

    Raises:
        InputError: there is none.
    """
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    folders = [Path(__file__).parent / "profiles", Path(__file__).parent.parent / "profiles"]
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}
    if name not in known:
        hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
        raise InputError(f"unknown profile {name!r}{hint}")
    return known[name]


def resolve(flags: Mapping[str, Any], profile: str | None, environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from flags, environment and profile, in this order of precedence.

    Args:
        flags: settings given on the command line or in Python, by name.
        profile: name or path of a profile.
        environment: defaults to the process's. ``EDGETRAIN_DATA`` is the folder of known data sets, not a
            setting, and is not read here.

    Raises:
        InputError: unknown name or wrong value, or code that no flag names; it says where.
    """
    settings = Settings()
    if profile is not None:
        path = find_profile(profile)
        values = read_profile(path)
        _check_code(values, flags, f"profile {path}")
        try:
            settings = settings.with_values(_as_decided(values))
        except InputError as error:
            raise InputError(f"profile {path}: {error}") from None
    values = _from_environment(os.environ if environment is None else environment)
    _check_code(values, flags, "the environment")
    settings = settings.with_values(values)
    return settings.with_values(flags)


def _check_code(values: Mapping[str, Any], flags: Mapping[str, Any], source: str) -> None:
    """Refuse a user's own code that only a profile or the environment names.

    Raises:
        InputError: it must be named by a flag.
    """
    for name in ("net", "method"):
        if is_own(str(values.get(name, ""))) and name not in flags:
            raise InputError(
                f"{source}: {name} = {shown(values[name])} names code, which is run only if the command line names it:"
                f" state --{name}"
            )


def _as_decided(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a profile; those of a run's ``config.toml`` ask for what its plan decided, for the same bits."""
    settings = {name: value for name, value in values.items() if name not in TABLES}
    plan = values.get("plan", {})
    if not isinstance(plan, Mapping):
        raise InputError(f"plan is {shown(plan)}; expected a table, as in a run's config.toml")
    decided = {name: plan[name] for name in ("micro_batch", "tiles") if name in plan}
    if plan.get("placement") == "resident":
        decided["placement"] = "resident"
    return {**settings, **decided}


def parse_numbers(text: str) -> int | list[int]:
    """A whole number, or several separated by commas.

    Raises:
        ValueError: it is neither.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{shown(text)}: expected a whole number, or several separated by commas") from None
    return numbers[0] if len(numbers) == 1 else numbers


def parse_size(text: str, unit: str) -> float:
    """A size in ``unit``, MB or GB, which may be stated in either: ``512``, ``512MB``, ``0.5GB``; 1 GB is 1024 MB.

    Raises:
        ValueError: it is not a size.
    """
    number, suffix = re.fullmatch(r"\s*(.*?)\s*((?:[kmgt]i?)?b|[mg])?\s*", text, re.IGNORECASE | re.DOTALL).groups()  # type: ignore[union-attr]
    stated = (suffix or unit)[0].upper()
    factors = {"M": 1.0, "G": 1024.0, "K": 1 / 1024, "T": 1024.0**2}
    try:
        if stated not in factors:
            raise ValueError
        return float(number) * (factors[stated] / factors[unit[0]])
    except ValueError:
        raise ValueError(f"{shown(text)}: expected a number of {unit}, such as 512, 512MB or 0.5GB") from None


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    hints = get_type_hints(Settings)
    found = {}
    known = [setting.name.upper() for setting in fields(Settings)]
    for variable in environment:
        name = variable.removeprefix("EDGETRAIN_")
        if name == variable or name in known or variable in _OTHER_VARIABLES:
            continue
        if close := difflib.get_close_matches(name[:_SEARCHED], known, 1):  # others may be somebody else's
            raise InputError(f"{variable}: unknown setting; did you mean 'EDGETRAIN_{close[0]}'?")
    for setting in fields(Settings):
        variable = f"EDGETRAIN_{setting.name.upper()}"
        if setting.name != "data" and variable in environment:
            found[setting.name] = _from_text(variable, environment[variable], hints[setting.name])
    return found


def _from_text(variable: str, text: str, hint: Any) -> Any:
    kinds, name = _alternatives(hint), variable.removeprefix("EDGETRAIN_").lower()
    try:
        if name in SIZES:
            return parse_size(text, SIZES[name])
        if any(get_origin(kind) is list for kind in kinds):
            return parse_numbers(text)
    except ValueError as error:
        raise InputError(f"{variable}={error}") from None
    if bool in kinds:
        words = {"1": True, "true": True, "0": False, "false": False}
        if text.lower() not in words:
            raise InputError(f"{variable}={text!r}: expected 1 or 0")
        return words[text.lower()]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise InputError(f"{variable}={text!r}: expected a number") from None
    return text


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _alternatives(part)]
    return [hint]


def _number(value: Any, name: str) -> Any:
    """Let a whole number stand where a float is expected."""
    kinds = _alternatives(get_type_hints(Settings)[name])
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or float not in kinds or int in kinds:
        return value
    _check_whole(name, value)
    return float(value)


def _check_whole(name: str, value: int) -> None:
    if abs(value) >= _NUMBER_LIMIT:
        raise InputError(f"{_flag(name)} is a whole number of {value.bit_length()} bits; expected at most 63")


def _check_type(name: str, value: Any, hint: Any) -> None:
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, int):
            _check_whole(name, part)
    if isinstance(value, str) and not _is_unicode(value):
        raise InputError(f"{_flag(name)} is {value!r}; expected text that can be written as UTF-8: rename the file")
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return
        elif get_origin(kind) is list:
            if isinstance(value, list) and value and all(type(part) is int for part in value):
                return
        elif type(value) is kind:
            return
    choices = [word for kind in _alternatives(hint) if get_origin(kind) is Literal for word in get_args(kind)]
    expected = ", ".join(choices) if choices else _describe(hint)
    hint_text = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise InputError(f"{_flag(name)} is {shown(value)}; expected {expected}{hint_text}")


def _is_unicode(text: str) -> bool:
    """Whether it has no surrogates, which stand for bytes of the command line that are no UTF-8."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return " or ".join(words[kind] for kind in _alternatives(hint) if kind in words)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not least <= value < float("inf"):
        raise InputError(f"{_flag(name)} is {value}; expected at least {least}")


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{_flag(name)} is {value}; expected more than 0")
