"""One face for the devices that edgetrain runs on: cuda, mps and cpu.

Everything that depends on the kind of device is asked here, so that no other file says ``torch.cuda``: memory,
limits, queues and events, page-locked buffers, generators. Every question names the device with its index; none is
about "the current" device or stream. What cannot be measured is ``None``, never 0. Sizes are bytes.

:class:`Cuda` holds all calls to ``torch.cuda``; tests put a simulated one in its place (``tests/simulated_cuda.py``).

On a device with unified memory (a Jetson, a GB10, Apple silicon) the device's memory *is* the
host's. There ``cudaMemGetInfo`` leaves out the page cache that the system would give back, so that
what is free is asked of the operating system instead.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from edgetrain.errors import EdgetrainWarning, InputError
from edgetrain.memory import nvml

if TYPE_CHECKING:
    import torch

DEFAULT_SHARE_PERCENT = 90
"""How much of what is free a run may take unasked; the rest is the desktop's."""

UNIFIED_SHARE_PERCENT = 60
"""Likewise where device and host share one memory; the host's side has what is then left of 90."""

CUBLAS_WORKSPACE = ":16:8"
"""Eight buffers of 16 KiB; see :func:`configure_cuda`."""

CUBLASLT_WORKSPACE_KIB = 128

_WORKSPACES = 4  # of cuBLAS and cuBLASLt, of the thread that computes and of autograd's
_UNSET_WORKSPACE_BYTES = 32 << 20  # what a workspace takes at most if nothing is configured

_HARMLESS_SETTINGS = {"pinned_use_background_threads", "pinned_use_cuda_host_register", "pinned_num_register_threads"}

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


class Cuda:
    """What ``torch.cuda`` is asked for; the only code that calls it."""

    def __getattr__(self, name: str) -> Any:
        """A function of ``torch.cuda``."""
        import torch

        return getattr(torch.cuda, name)

    def active(self, device: torch.device) -> AbstractContextManager[Any]:
        """A scope in which the device is the current one of this thread."""
        return self.device(device)  # type: ignore[no-any-return]

    def warm_up(self, device: torch.device) -> None:
        """Use what training uses: products, convolutions, their backward passes, and an optimizer."""
        import torch
        from torch import nn

        with self.active(device), torch.enable_grad():
            layers = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(64, 2)).to(device)
            optimizer = torch.optim.Adam(layers.parameters(), fused=True)
            layers(torch.zeros(2, 1, 8, 8, device=device)).square().sum().backward()
            optimizer.step()
            del layers, optimizer
        self.synchronize(device)
        self.empty_cache()

    def generator(self, device: torch.device) -> torch.Generator:
        """A new random generator of the device."""
        import torch

        return torch.Generator(device)

    def seed(self, device: torch.device, key: int) -> None:
        """Seed the device's default generator."""
        self.default_generators[device.index].manual_seed(key)

    def page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory, uninitialised, that the device can copy from and to while the host continues."""
        import torch

        return torch.empty(shape, dtype=dtype, pin_memory=True)


_cuda: Any = Cuda()


def cuda() -> Any:
    """What is asked in place of ``torch.cuda``; tests put a simulated one here."""
    return _cuda


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
        word = "cuda" if _cuda.is_available() else "cpu"
    if word == "cpu":
        return torch.device("cpu")
    if word == "mps":
        return _resolve_mps()
    if match := re.fullmatch(r"cuda(?::([0-9]{1,9}))?", word):
        return _resolve_cuda(match[1])
    raise InputError(f"--device {name}: unknown device; use auto, cuda, cuda:N, mps or cpu")


def is_cuda(name: str) -> bool:
    """Whether ``name`` (see :func:`resolve`) means a CUDA device on this machine."""
    word = name.strip().lower()
    return word.startswith("cuda") or (word == "auto" and bool(_cuda.is_available()))


def _resolve_mps() -> torch.device:
    import torch

    if not torch.backends.mps.is_available():
        raise InputError("--device mps: no Apple GPU that this torch can use; use --device cpu")
    return torch.device("mps")


def _resolve_cuda(index: str | None) -> torch.device:
    import torch

    asked = "cuda" if index is None else f"cuda:{index}"
    if not _cuda.is_available():
        raise InputError(f"--device {asked}: {_why_no_cuda()}, or use --device cpu")
    if index is None:
        # current_device() would create the context, and with it 300 MB that may not be wanted;
        # where somebody called set_device() the context is there already.
        initialized = _cuda.is_initialized()
        number = _cuda.current_device() if initialized else 0
        return torch.device("cuda", number)
    count = _cuda.device_count()
    if int(index) >= count:
        found = "only cuda:0 is there" if count == 1 else f"found cuda:0 to cuda:{count - 1}"
        raise InputError(f"--device {asked}: {found}; choose one of these")
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
    return bool(_cuda.get_device_properties(device).is_integrated)


def total_bytes(device: torch.device) -> int | None:
    """All memory of the device; on the CPU and on MPS the machine's."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().total)
    return int(_cuda.get_device_properties(device).total_memory)


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
    try:
        free, total = _cuda.mem_get_info(device)
    except RuntimeError:
        return None  # some virtual GPUs do not implement the query
    return int(free), int(total)


def reserved_bytes(device: torch.device) -> int:
    """What PyTorch's allocator holds on a CUDA device; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return int(_cuda.memory_reserved(device))


def default_budget(device: torch.device) -> int | None:
    """The budget of a run that states none: 90% of what is free on CUDA, 60% where the host shares it."""
    if device.type != "cuda":
        return None
    free, share = free_bytes(device), UNIFIED_SHARE_PERCENT if is_integrated(device) else DEFAULT_SHARE_PERCENT
    return None if free is None else free * share // 100


def default_host_bytes(device: torch.device, budget: int | None) -> int:
    """Host memory that a run may take for cells between visits if it states none: half of what is available.

    Of a memory that the device shares, what the device's ``budget`` leaves of 90%.
    """
    available = int(psutil.virtual_memory().available)
    if not is_integrated(device) or budget is None:
        return available // 2
    return max(0, min(available // 2, available * DEFAULT_SHARE_PERCENT // 100 - budget))


def context_bytes(device: torch.device) -> int | None:
    """What this process holds on the device outside PyTorch's allocator: context, kernels, libraries.

    Kernels and libraries are loaded when they are first used: a small training step makes sure that they are.
    ``None`` where the figure is unknown: not CUDA, no NVML (Jetson Orin), an NVML that does not tell processes apart
    (WSL). Where it knows this process by another id (a container with process ids of its own), the growth of what
    all processes hold is taken, if the device was asked before it was first used.
    """
    if device.type != "cuda":
        return None
    uuid = _uuid(device)
    before = None if _cuda.is_initialized() else nvml.used_bytes(uuid)
    _cuda.warm_up(device)
    used = nvml.process_bytes(uuid)
    if used is None and before is not None and (now := nvml.used_bytes(uuid)) is not None:
        used = now - before
    # A context is never free of charge: a figure that is not positive is a wrong figure.
    outside = 0 if used is None else used - int(_cuda.memory_reserved(device))
    return outside if outside > 0 else None


def energy_mj(device: torch.device) -> int | None:
    """Millijoules that a CUDA device took since its driver was loaded; ``None`` where NVML does not say."""
    return nvml.energy_mj(_uuid(device)) if device.type == "cuda" else None


def _uuid(device: torch.device) -> str | None:
    """What NVML knows a CUDA device by; ``None`` on an old torch."""
    found = getattr(_cuda.get_device_properties(device), "uuid", None)
    return None if found is None else f"GPU-{found}"


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
    fraction = 1.0 if budget_bytes is None else _fraction(budget_bytes, _capped_total(device))
    _cuda.set_per_process_memory_fraction(fraction, device)


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


def workspace_requests() -> list[int]:
    """Bytes of the workspaces that matrix products take from the allocator for good, as configured.

    Not measured on a GPU yet: by PyTorch's sources one for each handle and queue.
    """
    found = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    size = sum(int(kib) * int(count) << 10 for kib, count in found) or _UNSET_WORKSPACE_BYTES
    return [size] * _WORKSPACES


def check_allocator(device: torch.device) -> None:
    """Warn of settings of the allocator that the plan's model of it does not know (CUDA only)."""
    stated = allocator_settings() if device.type == "cuda" else None
    names = {part.split(":")[0].strip() for part in (stated or "").split(",")} - {""}
    if names - _HARMLESS_SETTINGS:
        warnings.warn(
            EdgetrainWarning(
                f"PYTORCH_CUDA_ALLOC_CONF={stated}: predicted peaks and the smallest budget are for the allocator's"
                " default settings; unset it"
            ),
            stacklevel=2,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the device or on a CPU standing in for it.

    torch has a class for it but does not always use it, and on a Jetson it fails while it writes
    the message: hence also by text.
    """
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):  # torch's own class is a RuntimeError too
        return False
    if isinstance(error, _cuda.OutOfMemoryError):
        return True
    text = str(error)
    return any(part in text for part in _OUT_OF_MEMORY_TEXTS) or bool(_JETSON_OUT_OF_MEMORY.search(text))


def allocator_settings() -> str | None:
    """Settings of PyTorch's allocator from the environment, or ``None``."""
    return os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or None


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Major and minor version of what a CUDA device can do."""
    major, minor = _cuda.get_device_capability(device)
    return int(major), int(minor)


def cuda_name(device: torch.device) -> str:
    """What a CUDA device calls itself."""
    return str(_cuda.get_device_name(device))


# --- a run on a device ------------------------------------------------------------------------


@contextmanager
def running_on(device: torch.device, budget_bytes: int | None) -> Iterator[None]:
    """A scope for work on a device: it is current, and its allocator refuses more than the budget.

    The workspaces of matrix products, which stay until the process ends, are taken first, as the plan has it.
    """
    with active(device):
        if device.type == "cuda":
            _cuda.warm_up(device)
        cap(device, budget_bytes)
        try:
            yield
        finally:
            cap(device, None)


def active(device: torch.device) -> AbstractContextManager[Any]:
    """A scope in which a CUDA device is the current one of this thread."""
    return _cuda.active(device) if device.type == "cuda" else nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done what it was asked for; elsewhere it has."""
    if device.type == "cuda":
        _cuda.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give the allocator's free segments back, and begin its peak anew."""
    if device.type == "cuda":
        _cuda.empty_cache()
        _cuda.reset_peak_memory_stats(device)


def seed_pool(device: torch.device, size: int) -> None:
    """Take a block of ``size`` bytes and give it back, so that later ones are split off it (CUDA only)."""
    if device.type == "cuda" and size:
        import torch

        torch.empty(size, dtype=torch.uint8, device=device)


def peak_reserved_bytes(device: torch.device) -> int:
    """The most that PyTorch's allocator has held since ``empty_cache``; 0 elsewhere than on CUDA."""
    return int(_cuda.max_memory_reserved(device)) if device.type == "cuda" else 0


# --- random numbers ---------------------------------------------------------------------------


def generator(device: torch.device) -> torch.Generator:
    """A new random generator of the device."""
    import torch

    return _cuda.generator(device) if device.type == "cuda" else torch.Generator(device)


def seed_default_generator(device: torch.device, key: int) -> None:
    """Seed the generator that modules on a CUDA device draw from; the CPU's is left alone."""
    if device.type == "cuda":
        _cuda.seed(device, key)


def generator_states() -> Callable[[], None] | None:
    """What puts the default generators of all CUDA devices back as they are now; ``None``: CUDA is not in use."""
    if not _cuda.is_initialized():
        return None
    states = _cuda.get_rng_state_all()
    return lambda: _cuda.set_rng_state_all(states)
