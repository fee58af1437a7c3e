"""Facts about a device, for people: its name, what it holds, and how it is set up; sizes in MiB."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.memory import device as devices
from edgetrain.memory import nvml
from edgetrain.units import to_mb

if TYPE_CHECKING:
    import torch


def name(device: torch.device) -> str:
    """What the device calls itself: ``NVIDIA GeForce RTX 3050``, or the processor's model."""
    if device.type == "cuda":
        return devices.cuda_name(device)
    return _processor_name()


def _processor_name(root: Path = Path("/")) -> str:
    """The processor's model; of a single-board computer, which has none, the board's."""
    cpu_info = _read_text(root / "proc/cpuinfo") or ""
    if match := re.search(r"^model name\s*:\s*(.+)$", cpu_info, re.MULTILINE):
        return match[1].strip()
    board = _read_text(root / "proc/device-tree/model")
    if board:
        return board.strip("\0\n ")
    return platform.processor() or platform.machine() or "unknown"


def describe(device: torch.device) -> dict[str, object]:
    """Facts about the device for ``doctor``; what is unknown is ``None``.

    Holds ``kind index name integrated total_mb free_mb default_budget_mb context_mb driver_version
    cuda_version compute_capability power_mode cublas_workspace cublaslt_workspace_kib
    allocator_settings``; sizes in MiB. On CUDA this creates the context.
    """
    facts: dict[str, object] = {
        "kind": device.type,
        "index": device.index,
        "name": name(device),
        "integrated": devices.is_integrated(device),
        "total_mb": to_mb(devices.total_bytes(device)),
        "free_mb": to_mb(devices.free_bytes(device)),
        "default_budget_mb": to_mb(devices.default_budget(device)),
        "context_mb": to_mb(devices.context_bytes(device)),
        "power_mode": power_mode(),
    }
    return facts | _cuda_facts(device)


def _cuda_facts(device: torch.device) -> dict[str, object]:
    """The facts that only CUDA has, all ``None`` elsewhere so that the keys are always the same."""
    facts: dict[str, object] = dict.fromkeys(
        (
            "driver_version",
            "cuda_version",
            "compute_capability",
            "cublas_workspace",
            "cublaslt_workspace_kib",
            "allocator_settings",
        )
    )
    if device.type != "cuda":
        return facts
    import torch

    major, minor = devices.compute_capability(device)
    return facts | {
        "driver_version": nvml.driver_version(),
        "cuda_version": torch.version.cuda,
        "compute_capability": f"{major}.{minor}",
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "cublaslt_workspace_kib": os.environ.get("CUBLASLT_WORKSPACE_SIZE"),
        "allocator_settings": devices.allocator_settings(),
    }


def power_mode(root: Path = Path("/")) -> str | None:
    """A Jetson's power mode, ``2 (25W)``, or without its name ``2``; ``None`` off a Jetson.

    nvpmodel itself would have to run as root; its files are readable.
    """
    status = _read_text(root / "var/lib/nvpmodel/status")
    match = re.search(r"pmode:\s*0*(\d+)", status or "")
    if not match:
        return None
    modes = _read_text(root / "etc/nvpmodel.conf") or ""
    named = re.search(rf"POWER_MODEL\s+ID={match[1]}\s+NAME=(\S+)", modes)
    return f"{match[1]} ({named[1].rstrip('>')})" if named else match[1]


def _read_text(path: Path) -> str | None:
    """A small system file's text, or ``None`` if it is not there or not for us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
