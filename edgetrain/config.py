"""Settings: everything that decides a run, as one frozen dataclass; unknown keys are errors.

Precedence: flag, then ``EDGETRAIN_*``, then profile, then the method's defaults. The resolved profile
is written to the run folder; rerunning it gives the same run.
"""

from __future__ import annotations

import difflib
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgetrain.errors import InputError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES = ("plan", "torch")  # of a run's config.toml, which are no settings
_PROFILE_LIMIT = 1 << 20  # bytes; a profile is a page, not a book
_DOTS_LIMIT = 100  # in a line; settings have none, and tomllib's time grows with the square of a name's parts
_SEARCHED = 100  # letters of an unknown word for which a known one is looked for
_NUMBER_LIMIT = 1 << 63  # TOML's whole numbers end here; what has thousands of digits cannot even be shown


def _setting(default: Any, help: str, flag: bool = True) -> Any:
    """A field with what ``--help`` says of it; ``flag``: whether the command line offers it."""
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True)
class Settings:
    """All settings of a run. ``None`` means: what the method or the machine prefers."""

    data: str = _setting("digits", "A known data set, or a path to an ``.npz``")
    input: Literal["image", "table", "tokens", "signal"] | None = _setting(
        None, "What rows of your own data are; by default 2 dims are a table, 3 and 4 images"
    )
    channels: Literal["first", "last"] | None = _setting(
        None, "Where your own images or signals have their channels; by default it is guessed"
    )
    net: str | None = _setting(
        None, "The net, literally: ``mlp:1000x2``, ``cnn:64,128``, ``vit:...``, ``path/to/net.py:function``"
    )
    cells: int | None = _setting(None, "Train only the first so many cells of the net")
    method: str = _setting("mf", "The local rule, or a baseline")
    constants: str | None = _setting(None, "The rule's own numbers, such as ``beta=0.5,dropout=0.1``")
    like: str | None = _setting(
        None, "For baselines: the method whose net options (biases, pooling, normalisation) to take"
    )
    schedule: Literal["separate", "sequence"] | None = _setting(
        None,
        "``separate`` finishes each cell before the next; ``sequence`` goes through all cells each epoch",
    )
    epochs: int = _setting(10, "Passes over the data, of each cell")
    batch_size: int = _setting(128, "Samples of one optimisation step")
    micro_batch: int | list[int] | None = _setting(
        None, "Samples on the device at once; a list gives one for each cell and for the classifier"
    )
    tiles: int | list[int] | None = _setting(
        None,
        "Pieces in which a cell's units are trained, where it is too wide for the device; a list gives one for each",
    )
    optimizer: Literal["adam", "adamw", "adamax", "sgd"] | None = _setting(None, "Optimizer of the cells")
    lr: float | None = _setting(None, "Learning rate of the cells")
    weight_decay: float | None = _setting(None, "Weight decay of the cells")
    classifier_lr: float | None = _setting(
        None, "Learning rate of the classifier on all cells' latents, where the method trains one"
    )
    classifier_weight_decay: float | None = _setting(None, "Weight decay of that classifier")
    classifier_epochs: int | None = _setting(
        None, "Epochs of that classifier; for rules that can do without one, this asks for it"
    )
    augment: str | None = _setting(None, "Changes to training images, such as ``crop,flip,cutout``")
    views: int | None = _setting(
        None, "Augmented copies of the data set that finished cells cache, under ``--schedule separate``"
    )
    seed: int = _setting(0, "Key of every random number")
    threads: int | None = _setting(None, "CPU threads")
    device: str = _setting("auto", "``auto``, ``cuda``, ``cuda:1``, ``mps`` or ``cpu``")
    max_gpu_mb: float | None = _setting(None, "Device memory that the run may take, in MiB")
    count_context: bool = _setting(
        False, "Take the CUDA context, which lies outside PyTorch's allocator, off the budget too"
    )
    max_host_mb: float | None = _setting(None, "Host memory for buffers and waiting cells, in MiB")
    max_disk_gb: float | None = _setting(None, "Disk that the run folder may take, in GiB")
    latent_dtype: Literal["float32", "float16", "bfloat16", "uint8"] = _setting("float32", "How latents lie on disk")
    placement: Literal["auto", "stream", "resident"] = _setting(
        "auto",
        "``stream``: the leanest form; ``resident``: all on the device; ``auto``: resident where it fits a GPU",
    )
    prefetch: int = _setting(
        2, "Batches gathered ahead by a thread; 0 turns background reading and writing off", flag=False
    )
    keep_latents: bool = _setting(False, "Leave the latent caches in the run folder")
    meter: Literal["auto", "full"] = _setting(
        "auto", "``full``: measure every step, not only the first two of each kind"
    )
    checkpoint_every: float | None = _setting(
        None, "Seconds between checkpoints; by default a minute or 5% of the run, whichever is longer"
    )
    time_limit: float | None = _setting(
        None, "Seconds after which the run saves a checkpoint and stops, to be resumed later"
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            _check_type(setting.name, getattr(self, setting.name), hints[setting.name])
        for name in ("epochs", "batch_size", "classifier_epochs", "threads", "cells", "views"):
            _check_least(name, getattr(self, name), 1)
        for name, asked in (("micro_batch", self.micro_batch), ("tiles", self.tiles)):
            for value in asked if isinstance(asked, list) else [asked]:
                _check_least(name, value, 1)
        for name in ("weight_decay", "classifier_weight_decay", "prefetch", "checkpoint_every", "seed"):
            _check_least(name, getattr(self, name), 0)
        for name in ("lr", "classifier_lr", "max_gpu_mb", "max_host_mb", "max_disk_gb", "time_limit"):
            _check_positive(name, getattr(self, name))
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
            raise InputError(f"profile {path}: is no file; expected a short TOML file")
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
        InputError: unknown name or wrong value; it says where.
    """
    settings = Settings()
    if profile is not None:
        path = find_profile(profile)
        values = read_profile(path)
        try:
            settings = settings.with_values(_as_decided(values))
        except InputError as error:
            raise InputError(f"profile {path}: {error}") from None
    settings = settings.with_values(_from_environment(os.environ if environment is None else environment))
    return settings.with_values(flags)


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


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    hints = get_type_hints(Settings)
    found = {}
    for setting in fields(Settings):
        variable = f"EDGETRAIN_{setting.name.upper()}"
        if setting.name != "data" and variable in environment:
            found[setting.name] = _from_text(variable, environment[variable], hints[setting.name])
    return found


def _from_text(variable: str, text: str, hint: Any) -> Any:
    kinds = _alternatives(hint)
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
