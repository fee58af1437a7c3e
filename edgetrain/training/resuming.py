"""How a run is resumed: with its own settings, and by which command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from edgetrain.config import Settings
from edgetrain.data.arrays import ARRAYS
from edgetrain.data.specs import absolute, is_path
from edgetrain.errors import InputError
from edgetrain.plugins import is_own
from edgetrain.store.atomic import missing_folders, storage_errors
from edgetrain.store.edit import open_folder
from edgetrain.training.config_file import settings_of
from edgetrain.training.methods import CLASS, given_again

# What may differ when a run is resumed, because it changes no bit of the result.
_FREE_ON_RESUME = {"max_host_mb", "max_disk_gb", "keep_latents", "meter", "checkpoint_every", "prefetch", "time_limit"}


def resumed_settings(path: Path, given: dict[str, Any], settings: Settings, may_start: bool) -> Settings:
    """The settings of the run in ``path`` or, if there is none, ``settings``.

    A file of data may have moved: whether it holds the run's rows is found when it is read.

    Args:
        path: the run folder.
        given: what was stated on the command line or in Python.
        settings: resolved without the run.
        may_start: whether a run is started where there is none, as in a loop that starts or resumes.

    Raises:
        InputError: the folder holds no run and none may be started, or something was stated that would change the run.
    """
    folder = open_folder(path)
    config = folder.config() if folder.is_run() else None
    if config is None:
        if not may_start:
            raise InputError(
                f"{path}: no run to resume; check --run-dir, or state --data, --net or --profile to start one there"
            )
        return settings
    kept = settings_of(path)
    if _is_own(kept.net) and kept.net != "modules" and "net" not in given:
        raise InputError(f"{path}: this run's net is your own code; name it again: --net {kept.net}")
    if "method" not in given:
        given_again(path, kept, None)
    data = absolute(settings.data) if "data" in given else kept.data
    if is_path(data) and is_path(kept.data):
        kept = replace(kept, data=data)
    for name, value in given.items():
        if name == "data" and data == kept.data:
            continue
        if name == "net" and _is_own(value) and _is_own(kept.net):
            continue  # the user's code may have moved; its cells are compared with the run's
        if name == "method" and is_own(value) and is_own(kept.method):
            continue  # likewise
        if name not in _FREE_ON_RESUME and getattr(settings, name) != getattr(kept, name):
            raise InputError(
                f"{path}: was begun with {name} = {getattr(kept, name)!r}, not {value!r}; resume it without"
                f" --{name.replace('_', '-')}, or start another run"
            )
    moved = {"net": _is_own(kept.net), "method": is_own(kept.method)}
    taken = [name for name in given if name in _FREE_ON_RESUME or moved.get(name)]
    return replace(kept, **{name: getattr(settings, name) for name in taken})


def _is_own(net: str | None) -> bool:
    """Whether it names a user's own code."""
    return net == "modules" or is_own(net)


@contextmanager
def run_folder(stated: Path | None, data: str, method: str) -> Iterator[Path]:
    """The stated run folder, or else a new one under ``runs/``: ``runs/mnist-mf``, ``runs/mnist-mf-2``, ...

    A new folder is made at once, so that several processes get one each; it is removed if it is still empty at the
    end.

    Raises:
        StorageError: the disk refused.
    """
    if stated is not None:
        yield stated
        return
    base = f"{Path(data).stem}-{method.rpartition(':')[2].lower()}"
    made = missing_folders(Path("runs"))
    for number in count(1):
        path = Path("runs") / (base if number == 1 else f"{base}-{number}")
        with storage_errors(path):
            path.parent.mkdir(exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
        break
    try:
        yield path
    finally:
        with suppress(OSError):
            for folder in (path, *made):
                folder.rmdir()


def resuming_command(path: Path, settings: Settings) -> str:
    """The command that resumes a run."""
    if settings.data == ARRAYS or settings.net == "modules" or settings.method == CLASS:
        return f"edgetrain.fit(..., run_dir={str(path)!r}, resume=True)"
    own = "".join(
        f" --{flag} {shlex.quote(spec)}"
        for flag, spec in (("net", settings.net), ("method", settings.method))
        if spec and is_own(spec)
    )
    return f"edgetrain fit --resume --run-dir {shlex.quote(str(path))}{own}"
