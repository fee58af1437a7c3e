"""Disk faults at every operation of a run, and damaged bytes in its files: how many were tried, and what came of them.

Run: python benchmarks/faults.py [--damages 10000] [--out NAME]

The trials are those of `tests/training/test_faults.py` and `test_damaged_runs.py`, which say what each must come to.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from reporting import publish

TESTS = Path(__file__).parent.parent / "tests" / "training"
_LINE = re.compile(r"^(?P<what>[\w ,]+): (?P<outcomes>\{.*\})$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=10000)
    parser.add_argument("--out")
    asked = parser.parse_args()
    sections = {
        "A fault at every operation on the run folder, then resumed": tried(
            "test_faults.py", {"EDGETRAIN_EXAMPLES": "10"}
        ),
        f"{asked.damages} random damages to the files of each run": tried(
            "test_damaged_runs.py", {"EDGETRAIN_EXAMPLES": str(asked.damages // 15)}
        ),
    }
    notes = "No trial came to other bits, a wrong result, or a traceback: the tests would have failed."
    publish(asked.out, "Faults and damages", sections, notes)


def tried(file: str, environment: dict[str, str]) -> list[dict[str, object]]:
    """What a file's tests print of their trials; ends the benchmark if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / file)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout)
    found = [match for match in map(_LINE.match, done.stdout.splitlines()) if match]
    rows = []
    for match in found:
        outcomes = ast.literal_eval(match["outcomes"])
        told = ", ".join(f"{name}: {number}" for name, number in outcomes.items())
        rows.append({"run and fault": match["what"], "tried": sum(outcomes.values()), "came to": told})
    return rows


if __name__ == "__main__":
    main()
