"""One face for the devices that edgetrain runs on: cuda, mps and cpu.

Everything that depends on the kind of device is asked here, so that the rest of the package never
says ``torch.cuda``. What cannot be measured is ``None``, never 0. Sizes are bytes; only
:func:`describe`, which a person reads, speaks MiB.

On a device with unified memory (a Jetson, a GB10, Apple silicon) the device's memory *is* the
host's. There ``cudaMemGetInfo`` leaves out the page cache that the system would give back, so that
what is free is asked of the operating system instead.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil  # type: ignore[import-untyped, unused-ignore]

from edgetrain.errors import InputError
from edgetrain.units import to_mb

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

DEFAULT_SHARE_PERCENT = 90
"""How much of what is free a run may take unasked; the rest is the desktop's."""

CUBLAS_WORKSPACE = ":16:8"
"""Eight buffers of 16 KiB; see :func:`configure_cuda`."""

CUBLASLT_WORKSPACE_KIB = 128

# Texts of a RuntimeError that mean "no memory left", besides torch's own exception class.
_OUT_OF_MEMORY_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
# On a Jetson torch asks NVML, which is not there, for the numbers of its out-of-memory message, and
# dies of that instead (pytorch issues 112377 and 185240). The line number after it varies.
_JETSON_OUT_OF_MEMORY = re.compile(r"NVML_SUCCESS == r\b.*INTERNAL ASSERT", re.DOTALL)


# --- which device -----------------------------------------------------------------------------


def resolve(name: str) -> torch.device:
    """The device that ``name`` means on this machine, with its index where it has one.

    ``auto`` is CUDA where there is any, else the CPU; never MPS, whose allocator we cannot cap.

    Args:
        name: ``auto``, ``cuda``, ``cuda:N``, ``mps`` or ``cpu``.

    Raises:
        InputError: the word is unknown, or this machine (or this torch) has no such device.
    """
    import torch

    word = name.strip().lower()
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    if word == "cpu":
        return torch.device("cpu")
    if word == "mps":
        return _resolve_mps()
    if match := re.fullmatch(r"cuda(?::([0-9]{1,9}))?", word):
        return _resolve_cuda(match[1])
    raise InputError(f"--device {name}: unknown device; use auto, cuda, cuda:N, mps or cpu")


def _resolve_mps() -> torch.device:
    import torch

    if not torch.backends.mps.is_available():
        raise InputError("--device mps: no Apple GPU that this torch can use; use --device cpu")
    return torch.device("mps")


def _resolve_cuda(index: str | None) -> torch.device:
    import torch

    asked = "cuda" if index is None else f"cuda:{index}"
    if not torch.cuda.is_available():
        raise InputError(f"--device {asked}: {_why_no_cuda()}, or use --device cpu")
    if index is None:
        # current_device() would create the context, and with it 300 MB that may not be wanted;
        # where somebody called set_device() the context is there already.
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call, unused-ignore]
        number = torch.cuda.current_device() if initialized else 0
        return torch.device("cuda", number)
    count = torch.cuda.device_count()
    if int(index) >= count:
        found = "only cuda:0 is there" if count == 1 else f"found cuda:0 to cuda:{count - 1}"
        raise InputError(f"--device {asked}: {found}; choose one that is there")
    return torch.device("cuda", int(index))


def _why_no_cuda() -> str:
    """What was found instead of CUDA, and what would bring it."""
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA; install a CUDA build of torch"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"no usable GPU with CUDA_VISIBLE_DEVICES={hidden!r}; unset it"
    return f"torch is built for CUDA {torch.version.cuda}, but no usable GPU was found; check the driver"


# --- memory -----------------------------------------------------------------------------------


def is_integrated(device: torch.device) -> bool:
    """Whether device and host share one memory, so that host staging costs device memory too.

    The CPU answers no: a run on it meters a device side apart from the host's.
    """
    if device.type == "mps":
        return True
    if device.type != "cuda":
        return False
    import torch

    return bool(torch.cuda.get_device_properties(device).is_integrated)


def total_bytes(device: torch.device) -> int | None:
    """All memory of the device; on the CPU and on MPS the machine's."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().total)
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def free_bytes(device: torch.device) -> int | None:
    """What could be allocated on the device now; ``None`` where the driver does not say.

    On CUDA this creates the context, which is then no longer counted as free.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    sizes = _cuda_free_and_total(device)
    if not is_integrated(device):
        return None if sizes is None else sizes[0]
    # The carve-out of a unified device can be smaller than what the system has available.
    available = int(psutil.virtual_memory().available)
    total = total_bytes(device)
    return available if total is None else min(available, total)


def _cuda_free_and_total(device: torch.device) -> tuple[int, int] | None:
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return None  # some virtual GPUs do not implement the query
    return int(free), int(total)


def reserved_bytes(device: torch.device) -> int:
    """What PyTorch's allocator holds on a CUDA device; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.memory_reserved(device))


def default_budget(device: torch.device) -> int | None:
    """The budget of a run that states none: 90% of what is free on CUDA, no limit elsewhere."""
    if device.type != "cuda":
        return None
    free = free_bytes(device)
    return None if free is None else free * DEFAULT_SHARE_PERCENT // 100


def context_bytes(device: torch.device) -> int | None:
    """What this process holds on the device outside PyTorch's allocator: context, kernels, libraries.

    ``None`` where that is unknown: not CUDA, no NVML (Jetson Orin), an NVML that does not tell
    processes apart (WSL), or one that knows this process by another id (a container with its own
    process ids).
    """
    if device.type != "cuda":
        return None
    import torch

    used = _ask_nvml(lambda nvml: _process_bytes(nvml, device))
    if used is None:
        return None
    outside = used - int(torch.cuda.memory_reserved(device))
    # A context is never free of charge: a figure that is not positive is a wrong figure.
    return outside if outside > 0 else None


def energy_mj(device: torch.device) -> int | None:
    """Millijoules that a CUDA device took since its driver was loaded; ``None`` where NVML does not say."""
    if device.type != "cuda":
        return None
    return _ask_nvml(lambda nvml: _energy_mj(nvml, device))


def _energy_mj(nvml: Any, device: torch.device) -> int | None:
    handle = _nvml_handle(nvml, device)
    return None if handle is None else int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _process_bytes(nvml: Any, device: torch.device) -> int | None:
    """What NVML says that this process holds on ``device``."""
    handle = _nvml_handle(nvml, device)
    if handle is None:
        return None
    me = os.getpid()
    sizes = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == me]
    if not sizes or None in sizes:
        return None
    return int(sum(sizes))


def _nvml_handle(nvml: Any, device: torch.device) -> Any | None:
    """NVML's handle of a CUDA device, or ``None`` where the two cannot be matched for certain.

    Matched by UUID, because CUDA_VISIBLE_DEVICES and CUDA's fastest-first order make CUDA's
    numbers differ from NVML's.
    """
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is not None:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(0) if nvml.nvmlDeviceGetCount() == 1 else None


def _ask_nvml(question: Callable[[Any], T | None]) -> T | None:
    """The answer of ``question(pynvml)``, or ``None`` if NVML is missing or refuses."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        try:
            return question(nvml)
        finally:
            nvml.nvmlShutdown()
    except Exception:
        # Besides NVMLError, drivers too old or too partial (Thor) fail with AttributeError, OSError
        # or ValueError. None of them may end a run for the sake of a number that is only shown.
        return None


# --- limits and settings ----------------------------------------------------------------------


def cap(device: torch.device, budget_bytes: int | None) -> None:
    """Make PyTorch's allocator refuse to reserve more than ``budget_bytes``; ``None`` lifts the cap.

    Works on CUDA only; elsewhere the meter alone watches. The context is outside the cap: who wants
    it inside takes it off the budget first.

    Args:
        device: where.
        budget_bytes: the most that may be reserved, in bytes, over all segments together.

    Raises:
        ValueError: the budget is not positive.
    """
    if budget_bytes is not None and budget_bytes <= 0:
        raise ValueError(f"a budget of {budget_bytes} bytes; expected at least 1")
    if device.type != "cuda":
        return
    import torch

    fraction = 1.0 if budget_bytes is None else _fraction(budget_bytes, _capped_total(device))
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def _capped_total(device: torch.device) -> int:
    """What torch multiplies the fraction by: the larger of two, so that the cap never exceeds the budget.

    Older torch takes cudaMemGetInfo's total, newer torch the device properties'; on most devices
    they are the same number.
    """
    sizes = _cuda_free_and_total(device)
    totals = (total_bytes(device), None if sizes is None else sizes[1])
    return max(total for total in totals if total is not None)


def _fraction(budget: int, total: int) -> float:
    """The fraction of ``total`` that torch turns back into exactly ``budget`` bytes.

    torch truncates the product. Of a plain quotient it would lose one byte half of the time, and
    with it the last segment of a plan that fills its budget: segments come in whole MiB.
    """
    if budget >= total:
        return 1.0
    fraction = budget / total
    return fraction if int(fraction * total) >= budget else math.nextafter(fraction, 1.0)


def configure_cuda() -> None:
    """Make cuBLAS small and deterministic. Call it before the first CUDA call of the process.

    Both libraries read their variable once, at the first matrix product, and keep what they
    allocated until the process ends: set later, it is ignored without a word. Values that the user
    has set win.

    ``CUBLAS_WORKSPACE_CONFIG``: torch allocates a workspace per handle and stream, 8.125 MiB, on
    compute capability 9 to 12 32 MiB; the newest torch leaves that to cuBLAS, outside the allocator and
    its cap, but cuBLAS reads the same variable. ``:16:8`` makes it 8 x 16 KiB = 128 KiB. It is also
    one of the two values with which NVIDIA promises the same bits on every run.

    ``CUBLASLT_WORKSPACE_SIZE`` is in KiB, 1024 unless set. Newer torch serves both libraries
    from one workspace and warns if this is larger than the other: hence 128.

    We never set ``expandable_segments``: it is fatal on a Jetson, and the plan's model of the
    allocator does not cover it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", str(CUBLASLT_WORKSPACE_KIB))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the device or on a CPU standing in for it.

    torch has a class for it but does not always use it, and on a Jetson it fails while it writes
    the message: hence also by text.
    """
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):  # torch's own class is a RuntimeError too
        return False
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    text = str(error)
    return any(part in text for part in _OUT_OF_MEMORY_TEXTS) or bool(_JETSON_OUT_OF_MEMORY.search(text))


# --- for people -------------------------------------------------------------------------------


def name(device: torch.device) -> str:
    """What the device calls itself: ``NVIDIA GeForce RTX 3050``, or the processor's model."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
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
        "integrated": is_integrated(device),
        "total_mb": to_mb(total_bytes(device)),
        "free_mb": to_mb(free_bytes(device)),
        "default_budget_mb": to_mb(default_budget(device)),
        "context_mb": to_mb(context_bytes(device)),
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

    major, minor = torch.cuda.get_device_capability(device)
    return facts | {
        "driver_version": _ask_nvml(_driver_version),
        "cuda_version": torch.version.cuda,
        "compute_capability": f"{major}.{minor}",
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "cublaslt_workspace_kib": os.environ.get("CUBLASLT_WORKSPACE_SIZE"),
        "allocator_settings": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
    }


def _driver_version(nvml: Any) -> str:
    version = nvml.nvmlSystemGetDriverVersion()
    return version.decode() if isinstance(version, bytes) else str(version)


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


# --- stand-in until the face lands ---
class Event:
    """Stand-in."""

    def synchronize(self) -> None:
        """Stand-in."""


class Copies:
    """Stand-in."""

    def scope(self): ...
    def after_compute(self): ...
    def before_compute(self): ...
    def record(self): ...
    def wait(self, event): ...


def copies(device):
    """Stand-in."""
    return


def record(device):
    """Stand-in."""
    return


def wait(device, event):
    """Stand-in."""


def staging(shape, dtype, device):
    """Stand-in."""
    import torch

    return torch.empty(shape, dtype=dtype)


def copies_async(device):
    """Stand-in."""
    return device.type == "cuda"


def seed_default_generator(device, key):
    """Stand-in."""
