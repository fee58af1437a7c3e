"""What all tests share: the cores, divided among processes, and figures for the end of the output."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable

import pytest
from tiers import CASES, OTHERS, rank

import edgetrain as edgetrain  # before torch, so that torch's threads do not spin while they wait

NOT_SLOW = "not slow"  # as in pyproject.toml

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All but a few cases of each parametrised test are slow, unless tests are named on the command line."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        if config.option.markexpr == NOT_SLOW:
            config.option.markexpr = ""
        return
    cases = defaultdict(list)
    for item in items:
        if "untrusted" in item.path.parts:
            item.add_marker("counted")
        cases[item.nodeid.partition("[")[0]].append(item)
    for each in cases.values():
        fast = sorted(
            (item for item in each if not item.get_closest_marker("slow")), key=lambda item: rank(item.nodeid)
        )
        for item in fast[CASES.get(each[0].path.parent.name, OTHERS) :]:
            item.add_marker("slow")


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
