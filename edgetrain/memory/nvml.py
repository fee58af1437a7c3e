"""NVIDIA's management library: what it knows of a device and of this process; ``None`` where it does not say."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def ask(question: Callable[[Any], T | None]) -> T | None:
    """The answer of ``question(pynvml)``, or ``None`` if NVML is missing or refuses."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return question(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        # Besides NVMLError, drivers too old or too partial (Thor) fail with AttributeError, OSError
        # or ValueError. None of them may end a run for the sake of a number that is only shown.
        return None


def process_bytes(uuid: str | None) -> int | None:
    """What this process holds on a device."""
    return ask(lambda pynvml: _process_bytes(pynvml, _handle(pynvml, uuid)))


def used_bytes(uuid: str | None) -> int | None:
    """What all processes hold on a device."""
    return ask(lambda pynvml: int(pynvml.nvmlDeviceGetMemoryInfo(_handle(pynvml, uuid)).used))


def energy_mj(uuid: str | None) -> int | None:
    """Millijoules that a device took since its driver was loaded."""
    return ask(lambda pynvml: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(_handle(pynvml, uuid))))


def driver_version() -> str | None:
    """The driver's version."""
    return ask(_driver_version)


def _driver_version(pynvml: Any) -> str:
    version = pynvml.nvmlSystemGetDriverVersion()
    return version.decode() if isinstance(version, bytes) else str(version)


def _process_bytes(pynvml: Any, handle: Any) -> int | None:
    me = os.getpid()
    sizes = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == me]
    return None if not sizes or None in sizes else int(sum(sizes))


def _handle(pynvml: Any, uuid: str | None) -> Any:
    """NVML's handle of a CUDA device.

    By UUID, because CUDA_VISIBLE_DEVICES and CUDA's fastest-first order make CUDA's numbers differ from NVML's.

    Raises:
        LookupError: the two cannot be matched for certain.
    """
    if uuid is not None:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    if pynvml.nvmlDeviceGetCount() != 1:
        raise LookupError("several devices, and no UUID to tell them apart")
    return pynvml.nvmlDeviceGetHandleByIndex(0)
