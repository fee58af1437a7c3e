"""The OpenMP wait policy is set before torch is loaded, or a warning says what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def ran(code: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


SHOW = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"


def test_the_policy_is_set_when_edgetrain_comes_first() -> None:
    assert ran(f"import edgetrain, torch; {SHOW}") == "PASSIVE\n"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_stated_policy_is_kept(name: str) -> None:
    assert ran(f"import edgetrain; {SHOW}", **{name: "7"}) == ("7\n" if name == "OMP_WAIT_POLICY" else "None\n")


def test_where_torch_came_first_a_warning_says_what_to_do() -> None:
    said = ran(f"import torch, edgetrain; {SHOW}")
    assert "import edgetrain first, or set OMP_WAIT_POLICY=PASSIVE" in said
    assert "import edgetrain first" not in ran("import torch, edgetrain", OMP_NUM_THREADS="1")
