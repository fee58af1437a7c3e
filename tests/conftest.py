"""What all tests share: the cores, divided among processes, and figures for the end of the output."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import edgetrain as edgetrain  # before torch, so that torch's threads do not spin while they wait

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes lines that are printed when all tests are done, in whichever process they ran."""
    return lambda line: record_property("figures", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    lines = [str(value) for report in reports for name, value in report.user_properties if name == "figures"]
    if lines:
        terminalreporter.section("figures")
    for line in lines:
        terminalreporter.write_line(line)
