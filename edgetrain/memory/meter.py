"""How many bytes the device side holds, exactly: on the CPU by watching storages live and die.

On a machine without a GPU the "device side" is the set of tensors that would be on the GPU. A
``TorchDispatchMode`` sees every operation's results, counts each untyped storage once and learns of
its death by weak reference. The same meter runs over fake tensors, so that a dry run predicts what
the real run measures. It does not see memory that a kernel takes for itself.

It watches only while it is entered. A visit's steps are one program, so the first of each kind
tells the peak of all; storages that it has seen keep being counted when it is not looking.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from edgetrain.memory import device as devices

WATCHED_REPEATS = 2  # of each kind of step: the first makes the optimizer's state, the second is steady


class Listener(Protocol):
    """Is told of every storage that the device side takes and gives back, in order."""

    def alloc(self, key: int, size: int) -> None:
        """Storage ``key`` came, with ``size`` bytes."""
        ...

    def free(self, key: int) -> None:
        """Storage ``key`` went."""
        ...


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of the device side, ``live``, and their highest value, ``peak``.

    Args:
        *listeners: hear every allocation and release (a model of CUDA's allocator, a timeline).
    """

    def __init__(self, *listeners: Listener):
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.peak_operation = ""
        self._listeners = listeners
        self._host_depth = 0
        self._known: Any = WeakIdKeyDictionary()
        self._graves: dict[int, weakref.ref[Any]] = {}
        self._serial = 0

    @contextmanager
    def host(self) -> Iterator[None]:
        """Tensors made in this scope are the host's and do not count."""
        self._host_depth += 1
        try:
            yield
        finally:
            self._host_depth -= 1

    def reset_peak(self) -> None:
        """Start a new maximum from what lives now."""
        self.peak, self.peak_operation = self.live, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):  # what enters from outside belongs to the host
            self._known.setdefault(tensor.untyped_storage(), 0)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._see(tensor.untyped_storage(), func)
        return out

    def _see(self, storage: Any, func: Any) -> None:
        if storage in self._known:
            return
        size = 0 if self._host_depth else storage.nbytes()
        self._known[storage] = size
        if size == 0:
            return
        self._serial += 1
        key = self._serial
        self._graves[key] = weakref.ref(storage, lambda _: self._bury(key, size))
        self.live += size
        for listener in self._listeners:
            listener.alloc(key, size)
        if self.live > self.peak:
            self.peak, self.peak_operation = self.live, str(func)

    def _bury(self, key: int, size: int) -> None:
        del self._graves[key]
        self.live -= size
        for listener in self._listeners:
            listener.free(key)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


class Meter(Protocol):
    """The device side's memory, as the trainer asks for it."""

    def watch(self, kind: Hashable = None) -> AbstractContextManager[Any]:
        """A scope whose allocations are measured; ``kind`` names repeated work that need not be each time."""
        ...

    def host(self) -> AbstractContextManager[Any]:
        """A scope whose tensors are the host's."""
        ...

    def start_cell(self, cell: Hashable) -> None:
        """Begin the maximum of a visit to ``cell``."""
        ...

    @property
    def cell_peak(self) -> int:
        """Highest bytes of the cell that was started last."""
        ...


class LiveMeter:
    """The meter of a device without an allocator of its own to ask: live bytes by ``LiveBytes``.

    Args:
        full: watch every step of every visit, not only the first two of each kind in a cell's first two visits.
        tracker: shared with a dry run that sets it up with a listener.
    """

    def __init__(self, full: bool = False, tracker: LiveBytes | None = None):
        self.tracker = tracker or LiveBytes()
        self._full = full
        self._seen: Counter[Hashable] = Counter()
        self._inside = 0
        self._cell: Hashable = None
        self._visits: Counter[Hashable] = Counter()
        self._peaks: dict[Hashable, int] = {}  # of cells that were visited before

    @contextmanager
    def watch(self, kind: Hashable = None) -> Iterator[None]:
        """See ``Meter.watch``; nested scopes are one."""
        if self._inside or not self._due(kind):
            yield
            return
        self._inside += 1
        try:
            with self.tracker:
                yield
        finally:
            self._inside -= 1

    def host(self) -> AbstractContextManager[Any]:
        """See ``Meter.host``."""
        return self.tracker.host()

    def start_cell(self, cell: Hashable) -> None:
        """See ``Meter.start_cell``; visits after the second are the same program and are not watched."""
        self._peaks[self._cell] = self.cell_peak
        self._cell = cell
        self._visits[cell] += 1
        self._seen.clear()
        self.tracker.reset_peak()

    @property
    def cell_peak(self) -> int:
        """See ``Meter.cell_peak``."""
        return max(self.tracker.peak, self._peaks.get(self._cell, 0))

    def _due(self, kind: Hashable) -> bool:
        if self._full:
            return True
        if self._visits[self._cell] > WATCHED_REPEATS:
            return False
        if kind is None:
            return True
        self._seen[kind] += 1
        return self._seen[kind] <= WATCHED_REPEATS


class CudaMeter:
    """The meter of a CUDA device: what PyTorch's allocator reserves, by its own count."""

    def __init__(self, device: torch.device):
        self._device = device

    def watch(self, kind: Hashable = None) -> AbstractContextManager[Any]:
        """See ``Meter.watch``; the allocator always watches."""
        return nullcontext()

    def host(self) -> AbstractContextManager[Any]:
        """See ``Meter.host``; host tensors are not in the allocator's count."""
        return nullcontext()

    def start_cell(self, cell: Hashable) -> None:
        """See ``Meter.start_cell``; blocks of another cell's shape are given back first."""
        devices.empty_cache(self._device)

    @property
    def cell_peak(self) -> int:
        """See ``Meter.cell_peak``."""
        return devices.peak_reserved_bytes(self._device)


def meter_of(device: torch.device, full: bool = False) -> Meter:
    """The meter that fits the device."""
    return CudaMeter(device) if device.type == "cuda" else LiveMeter(full)
