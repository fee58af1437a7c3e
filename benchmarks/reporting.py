"""What every benchmark says beside its figures: command, hardware, versions, commit."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from edgetrain.memory import device as devices
from edgetrain.memory import facts, host

RESULTS = Path(__file__).parent / "results"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_show(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def publish(name: str | None, title: str, sections: Mapping[str, Sequence[Mapping[str, Any]]], notes: str = "") -> None:
    """Print the sections and, if there is a name, write them to ``results/``."""
    facts = _facts()
    parts = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    for heading, rows in sections.items():
        parts += [f"## {heading}", "", table(rows), ""]
    text = "\n".join([*parts, notes.strip(), ""]).rstrip() + "\n"
    print(text)
    if name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)
        (RESULTS / f"{name}.json").write_text(json.dumps({"facts": facts, "sections": sections}, indent=1) + "\n")


def edgetrain(words: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a command prints with ``--json``; ends the benchmark if it fails."""
    command = [sys.executable, "-m", "edgetrain", *shlex.split(words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def highest_rss(child: subprocess.Popen[str]) -> int:
    """The highest resident memory of a process until it ends, in bytes, read from outside every 5 ms."""
    process, peak = psutil.Process(child.pid), 0
    while child.poll() is None:
        with suppress(psutil.Error):  # it may end between the two looks
            peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)
    return peak


def _facts() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = host.machine_facts()
    device = devices.resolve("auto")
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "device": facts.name(device),
        "cores": machine["cores"],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    }


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
