"""A run's ``config.toml``: the settings that were asked for; in tables what the plan decided, and of torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from edgetrain.config import TABLES, Settings, parse_profile
from edgetrain.errors import CorruptError, InputError
from edgetrain.planning.plan import Decisions
from edgetrain.store.edit import open_folder
from edgetrain.training.process import described

_BEFORE = "contiguous"  # of runs whose settings do not say it yet


def config_text(settings: Settings, decisions: Decisions) -> str:
    """``config.toml``, without the time limit, which is for one process."""
    import tomli_w

    plan = {name: value for name, value in msgspec.structs.asdict(decisions).items() if value is not None}
    tables = tomli_w.dumps({"plan": plan, "torch": described(settings.device)})
    return f"{replace(settings, time_limit=None).to_toml()}\n{tables}"


def settings_of(path: Path) -> Settings:
    """The settings of the run in a folder, as they were asked for.

    Raises:
        InputError: the folder holds no run, or a setting is unknown or wrong.
        CorruptError: the journal is damaged.
    """
    settings = {name: value for name, value in _values(path).items() if name not in TABLES}
    return Settings().with_values({"memory_format": _BEFORE, **settings})


def decisions_of(path: Path) -> Decisions:
    """What was decided for the run in a folder.

    Raises:
        InputError: the folder holds no run.
        CorruptError: the journal is damaged, or what it holds are no such decisions.
    """
    try:
        return msgspec.convert(_values(path).get("plan"), Decisions)
    except msgspec.ValidationError as error:
        raise CorruptError(f"{path / 'config.toml'}: [plan]: {error}") from error


def _values(path: Path) -> dict[str, Any]:
    config = open_folder(path).config()
    if config is None:
        raise InputError(f"{path}: holds no run")
    return parse_profile(config, path / "config.toml")
