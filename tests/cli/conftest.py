"""Runs the real command in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def edgetrain(tmp_path: Path) -> Command:
    """``edgetrain(*words)`` in an empty folder; gives exit code, stdout and stderr."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("EDGETRAIN_")}
        env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
        command = [sys.executable, "-m", "edgetrain", *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)

    return run
