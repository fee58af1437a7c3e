"""What changes around a run: other programs take memory, the device slows down.

Seen and said, each once; and a run that is about to lose its memory to the system saves a checkpoint first.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from edgetrain.memory import device as devices
from edgetrain.memory import facts
from edgetrain.units import MIB, show_mb

SLOWER = 1.5  # times as long as a cell's first epoch
_SLOW_VISITS = 2  # in a row, before it is said
_SHORTEST_S = 2.0  # shorter epochs vary by themselves
_LEAST_HOST = 256 * MIB
_LEAST_HOST_SHARE = 0.05


def _host() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


class SystemMonitor:
    """Looks at device and host between visits.

    Args:
        device: where the run computes.
        budget: device bytes that it may take, or ``None``.
        say: shows a line to the user.
        free: device bytes that are free, or ``None`` where that is unknown.
        host: host bytes that are available, and all.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int | None,
        say: Callable[[str], None],
        free: Callable[[torch.device], int | None] = devices.free_bytes,
        host: Callable[[], tuple[int, int]] = _host,
    ):
        self._device, self._budget, self._say, self._free, self._host = device, budget, say, free, host
        self._said: set[str] = set()
        self._first_pace: dict[int, float] = {}
        self._slow = 0

    def look(self) -> bool:
        """Whether the system is about to run out of memory, so that a checkpoint should be saved now."""
        self._look_at_device()
        available, total = self._host()
        short = available < max(_LEAST_HOST, int(_LEAST_HOST_SHARE * total))
        if short:
            self._once(
                "host",
                f"only {show_mb(available)} of system memory is left, so the system may kill this run: a checkpoint"
                " is saved now. Close other programs, or use a smaller --max-gpu-mb and --max-host-mb",
            )
        return short

    def visited(self, node: int, steps: int, seconds: float) -> None:
        """Take in how long a visit's steps took."""
        first = self._first_pace.setdefault(node, seconds / steps)
        slow = seconds > _SHORTEST_S and seconds / steps > SLOWER * first
        self._slow = self._slow + 1 if slow else 0
        if self._slow == _SLOW_VISITS:
            mode = facts.power_mode()
            self._once(
                "pace",
                f"steps take {seconds / steps / first:.1f} times as long as at first: the device may be throttling"
                f" (power mode {mode or 'unknown'}), or other programs use it",
            )

    def _look_at_device(self) -> None:
        if self._device.type != "cuda" or self._budget is None:
            return
        free = self._free(self._device)
        wanted = self._budget - devices.reserved_bytes(self._device)
        if free is not None and free < wanted:
            self._once(
                "device",
                f"only {show_mb(free)} of device memory is free, less than the {show_mb(wanted)} that this run may"
                " still use: another program is using the device",
            )

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(text)
