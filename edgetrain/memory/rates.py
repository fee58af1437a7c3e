"""How fast this machine is: what ``doctor`` measures and ``plan`` reckons with."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetrain.memory import device as devices
from edgetrain.memory import facts, queues
from edgetrain.memory.host import disk_rates
from edgetrain.units import MIB

_ROUNDS = 5  # of which the fastest counts: other programs can only slow a measurement down
_ROUND_S = 0.1  # at least
_TINY = 8  # numbers of a tensor that costs nothing but the call
_TINY_STEP_CALLS = 12  # operations of ``_tiny_step`` as ``planning.cost`` counts them


@dataclass(frozen=True)
class Rates:
    """Of a machine and one of its devices.

    Attributes:
        flops: float32 operations per second of a matrix product of a batch of 256 with 1024 x 1024 weights.
        memory: bytes per second that operations element by element read and write on the device.
        call_s: seconds that an operation costs however small it is.
        bus: bytes per second from pinned host memory to the device; ``None`` on the CPU.
        disk_read: bytes per second past the page cache; ``None``: unknown.
        disk_write: bytes per second until they are safe; ``None``: unknown.
        measured: the date, ``2026-11-30``.
    """

    flops: float
    memory: float
    call_s: float
    bus: float | None
    disk_read: float | None
    disk_write: float | None
    measured: str = ""


def measure(device: torch.device, folder: Path) -> Rates:
    """Measure each rate several times and take the best; ``folder`` says whose disk.

    Raises:
        StorageError: the folder cannot be written.
    """
    x, weights = torch.randn(256, 1024, device=device), torch.randn(1024, 1024, device=device)
    product_s = _tried(device, lambda: x @ weights)
    big = torch.randn(4 * MIB, device=device)
    out = torch.empty_like(big)
    sum_s = _tried(device, lambda: torch.add(big, big, out=out))
    disk = disk_rates(folder)
    return Rates(
        flops=2 * 256 * 1024 * 1024 / product_s,
        memory=3 * big.nbytes / sum_s,
        call_s=_tried(device, _tiny_step(device)) / _TINY_STEP_CALLS,
        bus=_bus(device),
        disk_read=_bytes(disk["read_mb_per_s"]),
        disk_write=_bytes(disk["write_mb_per_s"]),
        measured=date.today().isoformat(),
    )


def save(rates: Rates, device: torch.device) -> None:
    """Store the rates of a device for later plans; a folder that cannot be written stores none."""
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(
            json.dumps({**_known(path), _key(device): asdict(rates)}, indent=2) + "\n", encoding="utf-8"
        )
        temporary.replace(path)
    except OSError:
        return


def load(device: torch.device) -> Rates | None:
    """The rates that ``doctor`` measured of this device in its power mode and with this many threads, if it did."""
    try:
        found = Rates(**_known(_path())[_key(device)])
        optional = [rate for rate in (found.bus, found.disk_read, found.disk_write) if rate is not None]
        sound = all(0 < rate < float("inf") for rate in (found.flops, found.memory, found.call_s, *optional))
        sound = sound and isinstance(found.measured, str)
    except (KeyError, TypeError):
        return None  # there are none, or another version wrote them
    return found if sound else None


def _path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgetrain" / "rates.json"


def _known(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(device: torch.device) -> str:
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    mode = facts.power_mode()
    return f"{facts.name(device)}, torch {torch.__version__}{threads}{(mode and f', power mode {mode}') or ''}"


def _tried(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call, in the fastest of some rounds of calls."""
    work()
    return min(_round(device, work) for _ in range(_ROUNDS))


def _round(device: torch.device, work: Callable[[], object]) -> float:
    calls, spent = 0, 0.0
    while spent < _ROUND_S:
        start = time.perf_counter()
        for _ in range(8):
            work()
        devices.synchronize(device)
        spent += time.perf_counter() - start
        calls += 8
    return spent / calls


def _tiny_step(device: torch.device) -> Callable[[], object]:
    """A whole training step of next to no arithmetic: autograd, Python and the optimizer cost what they cost."""
    layer = nn.Linear(_TINY, _TINY, device=device)
    optimizer = torch.optim.Adam(layer.parameters(), fused=device.type in ("cpu", "cuda"))
    x, y = torch.randn(_TINY, _TINY, device=device), torch.zeros(_TINY, dtype=torch.int64, device=device)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x).relu(), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _bus(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    source = queues.staging((32 * MIB,), torch.uint8, device)
    target = torch.empty_like(source, device=device)
    return source.nbytes / _tried(device, lambda: target.copy_(source, non_blocking=True))


def _bytes(mb: float | None) -> float | None:
    return None if mb is None else mb * MIB
