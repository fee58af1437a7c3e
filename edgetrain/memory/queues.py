"""Copies beside the computation: a device's queues, points in them, and host memory that copies can use.

On CUDA a second queue copies while the first computes; elsewhere there is one, and nothing has to wait.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from edgetrain.memory import device as devices

if TYPE_CHECKING:
    import torch


class Event:
    """A point in a queue of the device."""

    def __init__(self, event: Any):
        self.event = event

    def synchronize(self) -> None:
        """Wait on the host until the device has come to it."""
        self.event.synchronize()


class Copies:
    """A queue of a CUDA device for copies, beside the one on which it computes."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, devices.cuda().Stream(device)

    def scope(self) -> AbstractContextManager[Any]:
        """Operations in this scope are queued here."""
        return devices.cuda().stream(self._stream)  # type: ignore[no-any-return]

    def after_compute(self) -> None:
        """Later copies wait for all that is queued for computation."""
        self._stream.wait_stream(devices.cuda().current_stream(self._device))

    def before_compute(self) -> None:
        """Later computation waits for all copies that are queued."""
        devices.cuda().current_stream(self._device).wait_stream(self._stream)

    def record(self) -> Event:
        """The point behind all copies that are queued."""
        return Event(self._stream.record_event())

    def wait(self, event: Event) -> None:
        """Later copies wait until the device has come to a point."""
        self._stream.wait_event(event.event)


def copies(device: torch.device) -> Copies | None:
    """A queue for copies; ``None`` where there is none beside the computation."""
    return Copies(device) if copies_async(device) else None


def copies_async(device: torch.device) -> bool:
    """Whether a copy to the device may run while the host continues: on CUDA only.

    MPS would read a host buffer after it was filled again (pytorch issues 139550, 189690).
    """
    return device.type == "cuda"


def record(device: torch.device) -> Event | None:
    """The point behind all computation that is queued; ``None`` where nothing is."""
    return Event(devices.cuda().current_stream(device).record_event()) if device.type == "cuda" else None


def wait(device: torch.device, event: Event) -> None:
    """Later computation waits until the device has come to a point."""
    devices.cuda().current_stream(device).wait_event(event.event)


def staging(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory, uninitialised, for what is copied to or from a device; page-locked for CUDA."""
    import torch

    return devices.cuda().page_locked(shape, dtype) if copies_async(device) else torch.empty(shape, dtype=dtype)
