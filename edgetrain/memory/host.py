"""What the host side of a run holds, and what this machine is made of.

Resident memory is the whole process's: interpreter, torch's libraries (some 200 MiB) and pages of
mapped files that the system could take back. Its growth says more than its height, so
:class:`PeakRss` reports both ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped, unused-ignore]

from edgetrain.errors import StorageError
from edgetrain.units import MIB, to_mb

SAMPLE_INTERVAL_S = 0.05

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CHUNK = MIB
_TRIM_THRESHOLD, _MAP_THRESHOLD = -1, -3  # of glibc's mallopt
_NEVER, _HIGHEST = (1 << 31) - 1, 32 * MIB  # bytes; blocks above the latter are mapped in any case
_NAMED_PACKAGES = ("torch", "numpy", "safetensors", "psutil")


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


class PeakRss:
    """The highest resident memory of this process within a ``with`` block.

    A thread samples every 50 ms, so that a shorter peak can be missed. Where Linux lets us, its own
    high-water mark closes that gap: it is the peak since the process began, therefore it is reset
    on entering (also for anybody else who reads this process's ``VmHWM``). Blocks may nest.

    Attributes:
        start_bytes: resident memory on entering; 0 before.
    """

    def __init__(self, interval_s: float = SAMPLE_INTERVAL_S) -> None:
        self.start_bytes = 0
        self._interval_s = interval_s
        self._peak = 0
        self._exact = False
        self._lock = threading.Lock()  # the thread and a reader must not lose each other's maximum
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_bytes(self) -> int:
        """The highest resident memory seen so far, up to the end of the block."""
        if self._thread is not None:
            self._sample()
        return self._peak

    def __enter__(self) -> PeakRss:
        for outer in _running:
            outer._sample()  # what it would read later is about to be reset
        self._exact = _reset_high_water()
        self.start_bytes = self._peak = rss_bytes()
        self._done.clear()
        self._thread = threading.Thread(target=self._watch, name="edgetrain-rss", daemon=True)
        _running.append(self)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()
        self._thread = None
        _running.remove(self)

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        """Take one sample; one that cannot be read, as when no more files can be opened, is left out."""
        with self._lock, contextlib.suppress(OSError):
            mark = (_high_water() or 0) if self._exact else 0
            self._peak = max(self._peak, rss_bytes(), mark)


_running: list[PeakRss] = []


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark back to the present; whether it could be."""
    try:
        # "5" is the one value of clear_refs that touches only the mark (proc(5)).
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _high_water() is not None


def _high_water() -> int | None:
    """The kernel's high-water mark of resident memory; ``None`` where it keeps none."""
    try:
        match = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


# --- the machine ------------------------------------------------------------------------------


def is_wsl() -> bool:
    """Whether this is Linux under Windows, where NVML and pinned memory have limits of their own."""
    return "microsoft" in platform.release().lower()


def cores() -> int:
    """How many processors this process may run on; containers and taskset allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_facts() -> dict[str, object]:
    """Facts about the machine for ``doctor``, gathered without importing torch.

    Holds ``platform machine python is_wsl cores cores_total ram_total_mb ram_available_mb
    swap_total_mb versions``; sizes in MiB; ``versions`` maps a package to its version, or to
    ``None`` where it is not installed.
    """
    memory = psutil.virtual_memory()
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "is_wsl": is_wsl(),
        "cores": cores(),
        "cores_total": os.cpu_count(),
        "ram_total_mb": to_mb(memory.total),
        "ram_available_mb": to_mb(memory.available),
        "swap_total_mb": to_mb(psutil.swap_memory().total),
        "versions": {package: _version(package) for package in _NAMED_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- the disk ---------------------------------------------------------------------------------


def disk_rates(folder: Path, size: int = 64 * MIB) -> dict[str, float | None]:
    """How fast ``folder``'s disk writes and reads in sequence, tried with a file that is removed again.

    Returns:
        ``write_mb_per_s`` (until fsync returns), ``read_mb_per_s`` (past the page cache; ``None``
        where the system cannot drop it, since memory's rate would pass for the disk's) and
        ``free_mb``; in MiB.

    Args:
        folder: an existing folder on the disk in question.
        size: how many bytes to write; a few seconds' worth on an SD card.

    Raises:
        StorageError: the folder cannot be written or read, or the disk is full.
    """
    try:
        free = psutil.disk_usage(str(folder)).free
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".edgetrain-rate-") as file:
            descriptor = file.fileno()
            write_s = _seconds(lambda: _write(descriptor, size))
            read_s = _seconds(lambda: _read(descriptor)) if _drop_cache(descriptor) else None
    except OSError as error:
        raise StorageError(
            f"{folder}: could not write and read {size} bytes ({error.strerror or error}); "
            "expected an existing folder that is writable and has room; name another"
        ) from error
    return {
        "write_mb_per_s": _rate(size, write_s),
        "read_mb_per_s": None if read_s is None else _rate(size, read_s),
        "free_mb": to_mb(free),
    }


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rate(size: int, seconds: float) -> float:
    """MiB per second."""
    return round(size / MIB / max(seconds, 1e-9), 1)


def _write(descriptor: int, size: int) -> None:
    # Random bytes, as a file system that compresses would make zeros look fast.
    chunk = memoryview(os.urandom(min(_CHUNK, size)))
    left = size
    while left > 0:
        left -= os.write(descriptor, chunk[: min(left, len(chunk))])
    os.fsync(descriptor)


def _read(descriptor: int) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    while os.read(descriptor, _CHUNK):
        pass


def _drop_cache(descriptor: int) -> bool:
    """Drop the file's pages from the page cache; whether the system can. Only clean pages go: fsync first."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


@contextlib.contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """A scope in which the C library (glibc) keeps large blocks that were freed for the next request.

    It maps and unmaps them one by one otherwise, and the system must clear their pages each time: a sixth of the time
    of a step that moves every layer. Afterwards the limits are the highest that the library sets itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MAP_THRESHOLD, _HIGHEST)
    mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        mallopt(_TRIM_THRESHOLD, 2 * _HIGHEST)
        give_back_free_memory()


def give_back_free_memory() -> None:
    """Let the C library return what was freed to the system, where it offers that (glibc).

    Cells of 16 MiB and more that come and go would otherwise leave holes in the heap, and the resident
    memory of a deep run would creep upwards.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
