"""A check of this machine: device, memory, disk, speed, and possible problems."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from edgetrain.data.fetch import locate
from edgetrain.data.known import KNOWN
from edgetrain.memory import device as devices
from edgetrain.memory import facts as device_facts
from edgetrain.memory import host, rates
from edgetrain.memory.energy import sensor_of
from edgetrain.memory.rates import Rates
from edgetrain.units import MIB, to_mb

_LOW_DISK_MB = 2048
_SLOW_DISK_MB_S = 50


def examine(folder: Path) -> dict[str, Any]:
    """Facts about machine, device, disk and data sets, and a list of warnings."""
    devices.configure_cuda()
    device = devices.resolve("auto")
    found, free = rates.measure(device, folder), shutil.disk_usage(folder).free
    rates.save(found, device)
    facts: dict[str, Any] = {
        "machine": host.machine_facts(),
        "device": {**device_facts.describe(device), **_speeds(found), "energy_sensor": _sensor_name(device)},
        "disk": {"folder": str(folder.absolute()), "free_mb": to_mb(free), **_disk(found)},
        "data": {name: str(locate(known) or "not here; downloaded when first used") for name, known in KNOWN.items()},
    }
    facts["warnings"] = list(_warnings(facts, device))
    return facts


def show(facts: dict[str, Any]) -> None:
    """The facts as tables, on stdout."""
    console = Console(highlight=False, markup=False)
    for title in ("machine", "device", "disk", "data"):
        table = Table(title, "", box=None, header_style="bold")
        for key, value in facts[title].items():
            table.add_row(key.replace("_", " "), _show(value))
        console.print(table)
        console.print()
    for warning in facts["warnings"]:
        console.print(f"- {warning}", soft_wrap=True)
    if not facts["warnings"]:
        console.print("No problems found.")


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return "unknown" if value is None else str(value)


def _sensor_name(device: torch.device) -> str | None:
    sensor = sensor_of(device)
    return sensor.name if sensor else None


def _speeds(found: Rates) -> dict[str, float | str | None]:
    """Rates of the device as people read them."""
    return {
        "gflops_float32": round(found.flops / 1e9, 1),
        "memory_mb_per_s": round(found.memory / MIB),
        "call_us": round(found.call_s * 1e6, 1),
        "measured": found.measured,
        "bus_mb_per_s": None if found.bus is None else round(found.bus / MIB),
    }


def _disk(found: Rates) -> dict[str, float | None]:
    return {
        "write_mb_per_s": None if found.disk_write is None else round(found.disk_write / MIB, 1),
        "read_mb_per_s": None if found.disk_read is None else round(found.disk_read / MIB, 1),
    }


def _warnings(facts: dict[str, Any], device: torch.device) -> Iterator[str]:
    if device.type == "cpu":
        yield (
            f"torch {torch.__version__} finds no CUDA device: runs use the CPU, where --max-gpu-mb limits the"
            " tensors that would be on a GPU"
        )
        if torch.version.cuda is None:
            yield "this torch is a CPU build; with an NVIDIA GPU, install the build for its driver from pytorch.org"
    free, rate = facts["disk"].get("free_mb"), facts["disk"].get("write_mb_per_s")
    if free is not None and free < _LOW_DISK_MB:
        yield f"only {free:.0f} MiB are free on this disk; the latents of a run need space (see edgetrain plan)"
    if rate is not None and rate < _SLOW_DISK_MB_S:
        yield f"this disk writes {rate:.0f} MB/s; --latent-dtype uint8 moves a quarter of the bytes"
    if facts["machine"].get("is_wsl"):
        yield "under WSL the driver does not report memory by process: the size of the CUDA context is unknown"
