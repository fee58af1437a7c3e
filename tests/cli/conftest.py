"""Runs the real command in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import commands
import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def edgetrain(tmp_path: Path) -> Command:
    """``edgetrain(*words)`` in an empty folder; gives exit code, stdout and stderr."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("EDGETRAIN_")}
        return commands.run(words, tmp_path, env | {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment})

    return run
