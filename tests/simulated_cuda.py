"""A simulated CUDA behind the device's face (``memory.device``), so that whole GPU runs are carried out on the CPU.

Tensors stay the CPU's; a dispatch mode knows of every storage whether it is the host's or a device's, and

* raises where an operation mixes the two, or two devices;
* tells PyTorch's own race checker of every operation, with the queue that it would run on and what it reads and
  writes, by the addresses that the allocator would give, so that memory that is used again too early is found as well;
* finds host buffers that are filled again while a copy may still read them;
* counts reads by the host, which wait for the device;
* gives memory out by the model of CUDA's allocator, under the cap.

It computes on the CPU, so that its results are those of a CPU run. What a real GPU does beside (kernels' scratch,
the order of sums) it does not show.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.cuda._sanitizer as sanitizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from edgetrain.memory import device as devices
from edgetrain.memory.allocator import CachingAllocatorModel
from edgetrain.store.latents import LatentFile
from edgetrain.units import MIB

CROSSING = {"aten::copy_", "aten::_to_copy"}
HOST_READS = {"aten::_local_scalar_dense", "aten::is_nonzero"}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


class RaceError(AssertionError):
    """Two operations on the same memory, neither of which waits for the other."""


class MixedDevicesError(RuntimeError):
    """An operation on tensors that are not on one device."""


@dataclass
class Queue:
    """A stream of a device."""

    cuda: SimulatedCuda
    number: int
    device: torch.device

    def wait_stream(self, other: Queue) -> None:
        """See ``torch.cuda.Stream``."""
        self.wait_event(other.record_event())

    def wait_event(self, event: Point) -> None:
        """See ``torch.cuda.Stream``."""
        assert event.queue.device == self.device, "an event of another device"
        self.cuda.checker._handle_event_wait(event.number, self.number)

    def record_event(self) -> Point:
        """See ``torch.cuda.Stream``."""
        return Point(self)


class Point:
    """An event."""

    def __init__(self, queue: Queue):
        self.queue, self.number = queue, queue.cuda.next_number()
        queue.cuda.checker._handle_event_creation(self.number)
        queue.cuda.checker._handle_event_record(self.number, queue.number)

    def synchronize(self) -> None:
        """See ``torch.cuda.Event``."""
        self.queue.cuda.checker._handle_event_synchronization(self.number)


@dataclass
class Memory:
    """One device's allocator."""

    model: CachingAllocatorModel = field(default_factory=CachingAllocatorModel)
    served: int = 0  # requests so far


class Place:
    """Where a storage is.

    Attributes:
        device: index of the device; ``None``: the host.
        address: by which the race checker knows it.
        page_locked: whether the device copies from it or to it while the host goes on.
        copied: (queue, number of the operation) of the newest copy that did not wait.
    """

    __slots__ = ("address", "copied", "device", "page_locked")

    def __init__(self, device: int | None, address: int, page_locked: bool = False):
        self.device, self.address, self.page_locked = device, address, page_locked
        self.copied: tuple[int, int] | None = None


class SimulatedCuda:
    """Answers in place of ``torch.cuda``.

    Args:
        devices: how many there are.
        total: bytes of each.
        integrated: whether they share the host's memory.
        fails_at: number of the request (of all devices) at which memory runs out once; 0: never.
        scratch: bytes that every product of matrices takes for its duration.
    """

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(
        self, devices: int = 2, total: int = 4096 * MIB, integrated: bool = False, fails_at: int = 0, scratch: int = 0
    ):
        self.count, self.total, self.integrated, self.fails_at, self.scratch = (
            devices, total, integrated, fails_at, scratch,
        )  # fmt: skip
        self.checker = sanitizer.EventHandler()
        self.memories = [Memory() for _ in range(devices)]
        self.mode: _Mode | None = None
        self.current = 0
        self.host_reads: Counter[str] = Counter()
        self.seeds: list[int] = []
        self.peak = 0  # reserved on any device, whatever peaks were begun anew
        self.workspaces: set[tuple[int, bool]] = set()  # by device and thread, kept until the process ends
        self._numbers = 0
        self._main = [Queue(self, self.next_number(), torch.device("cuda", index)) for index in range(devices)]
        self._queues = list(self._main)
        for queue in self._main:
            self.checker._handle_stream_creation(queue.number)

    def next_number(self) -> int:
        """A number that nothing else has."""
        self._numbers += 1
        return self._numbers

    # -- what the face asks ------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return False

    def current_device(self) -> int:
        return self.current

    def device_count(self) -> int:
        return self.count

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(total_memory=self.total, is_integrated=self.integrated, uuid=f"simulated-{device.index}")

    def get_device_name(self, device: torch.device) -> str:
        return "Simulated GPU"

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return 8, 6

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.total - self._memory(device).model.reserved_bytes, self.total

    def memory_reserved(self, device: torch.device) -> int:
        return self._memory(device).model.reserved_bytes

    def max_memory_reserved(self, device: torch.device) -> int:
        return self._memory(device).model.peak_reserved_bytes

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        self._memory(device).model.limit_bytes = None if fraction == 1.0 else int(fraction * self.total)

    def empty_cache(self) -> None:
        for memory in self.memories:
            memory.model.empty_cache()

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self._memory(device).model.reset_peaks()

    def synchronize(self, device: torch.device) -> None:
        self.checker._handle_device_synchronization()

    def warm_up(self, device: torch.device) -> None:
        """See ``memory.device.Cuda``."""
        for backward in (False, True):
            self.hold_workspaces(device.index, backward)

    def hold_workspaces(self, index: int, backward: bool) -> None:
        """What the matrix products of a thread take for good."""
        if (index, backward) not in self.workspaces:
            self.workspaces.add((index, backward))
            for size in devices.workspace_requests()[:2]:
                self.allocate(index, self.next_number(), size)

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator("cpu")

    def seed(self, device: torch.device, key: int) -> None:
        self.seeds.append(key)

    def Stream(self, device: torch.device) -> Queue:
        queue = Queue(self, self.next_number(), device)
        self.checker._handle_stream_creation(queue.number)
        return queue

    def current_stream(self, device: torch.device) -> Queue:
        assert device.index is not None, "a device without its index"
        return self._queues[device.index]

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        before = self._queues[queue.device.index]
        self._queues[queue.device.index] = queue
        try:
            yield
        finally:
            self._queues[queue.device.index] = before

    def page_locked(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype)
        if self.mode is not None:
            self.mode.known[made.untyped_storage()] = Place(None, self.next_number(), page_locked=True)
        return made

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        outer, self.mode = self.mode, self.mode or _Mode(self)
        try:
            if outer is not None and outer in _get_current_dispatch_mode_stack():
                yield
            else:
                with self.mode, _Devices(self.mode):
                    yield
        finally:
            self.current, self.mode = before, outer

    # ----------------------------------------------------------------------------------------------

    def _memory(self, device: torch.device) -> Memory:
        assert device.index is not None, "a device without its index"
        return self.memories[device.index]

    def allocate(self, index: int, key: int, size: int) -> int:
        """Give memory out; where it begins."""
        memory = self.memories[index]
        memory.served += 1
        if self.fails_at and sum(each.served for each in self.memories) == self.fails_at:
            self.fails_at = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more (simulated)")
        try:
            memory.model.alloc(key, size)
        except MemoryError as error:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes ({error})") from None
        self.peak = max(self.peak, memory.model.peak_reserved_bytes)
        found = memory.model._live[key]
        # Devices and the host have addresses of their own.
        return (index + 1 << 50) + (0 if found is None else found.address)


class _Mode(TorchDispatchMode):
    """Watches every operation of the thread that computes."""

    def __init__(self, cuda: SimulatedCuda):
        super().__init__()
        self.cuda, self.known = cuda, WeakIdKeyDictionary()
        self._graves: dict[int, weakref.ref[Any]] = {}
        self._lock = threading.Lock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = self._target(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(type(leaf) is not torch.Tensor and type(leaf) is not torch.nn.Parameter for leaf in tensors):
            return func(*args, **kwargs)  # fake tensors of a dry run
        places = [self._place(leaf) for leaf in tensors]
        self._check(func, tensors, places)
        self._read_by_host(func, args, kwargs, target)
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out, target)
        return out

    def _target(self, func: Any, args: Any, kwargs: dict[str, Any]) -> int | None:
        """Index of the device on which the operation makes its results; what it is told of it becomes the CPU."""
        stated = kwargs.get("device")
        if stated is not None:
            device = torch.device(stated)
            if device.type == "cuda":
                kwargs["device"] = torch.device("cpu")
                return self.cuda.current if device.index is None else device.index
            return None
        if func._schema.name == "aten::copy_":
            return self._place(args[0]).device
        found = {self._place(leaf).device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        return next((index for index in found if index is not None), None)

    def _place(self, tensor: torch.Tensor) -> Place:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = Place(None, self.cuda.next_number())
        return self.known[storage]  # type: ignore[no-any-return]

    def _check(self, func: Any, tensors: list[torch.Tensor], places: list[Place]) -> None:
        name = func._schema.name
        if name in CROSSING:
            return
        found = {place.device for tensor, place in zip(tensors, places, strict=True) if tensor.ndim or place.device}
        if len(found) > 1:
            raise MixedDevicesError(f"{name} on tensors of {sorted(map(str, found))}")

    def _read_by_host(self, func: Any, args: Any, kwargs: dict[str, Any], target: int | None) -> None:
        """A value that the host reads waits for the device."""
        name = func._schema.name
        if name not in HOST_READS and not (name in CROSSING and target is None):
            return
        source = self._place(args[name == "aten::copy_"])
        if source.device is None:
            return
        self.cuda.host_reads[name] += 1
        self.cuda.checker._handle_stream_synchronization(self.cuda._queues[source.device].number)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any, target: int | None) -> None:
        reads: set[int] = set()
        writes: set[int] = set()
        names: dict[int, list[str]] = {}
        values = [*args, *kwargs.values()]
        arguments = [*func._schema.arguments[: len(args)], *(_argument(func, name) for name in kwargs)]
        for argument, value in zip(arguments, values, strict=False):
            written = argument is not None and argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    place = self._place(leaf)
                    if place.device is not None or place.page_locked:
                        (writes if written else reads).add(place.address)
                        names.setdefault(place.address, []).append("" if argument is None else argument.name)
        made = self._made(func, out, target)
        names |= {address: ["out"] for address in made}
        if target is None and not any(self._is_device(value) for value in values):
            return
        index = target if target is not None else self._device_of(values)
        queue = self.cuda._queues[index]
        if func.is_view:
            return
        self._copied(func, args, kwargs, queue)
        checker = self.cuda.checker
        errors = checker._handle_kernel_launch(
            queue.number, reads - writes - made, writes | made, made, func._schema.name, names
        )
        if errors:
            found = errors[0]
            raise RaceError(
                f"{func._schema.name} on queue {queue.number} does not wait for {found.previous_access.operator}"
            )

    def _copied(self, func: Any, args: Any, kwargs: dict[str, Any], queue: Queue) -> None:
        """A copy from or to a page-locked buffer: the host may touch that only when the copy is done."""
        name = func._schema.name
        if name == "aten::copy_":
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            for tensor in args[:2]:
                place = self._place(tensor)
                if place.device is None and place.page_locked and not waits:
                    place.copied = (queue.number, self.cuda.checker.seq_num + 1)

    def _made(self, func: Any, out: Any, target: int | None) -> set[int]:
        """Addresses of storages that the operation made."""
        made: set[int] = set()
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage in self.known:
                continue
            if target is None:
                self.known[storage] = Place(None, self.cuda.next_number())
                continue
            self._take_workspace(func, target)
            key = self.cuda.next_number()
            address = self.cuda.allocate(target, key, storage.nbytes())
            self.known[storage] = Place(target, address)
            self._graves[key] = weakref.ref(storage, lambda _, key=key, index=target: self._free(index, key))
            made.add(address)
        return made

    def _take_workspace(self, func: Any, index: int) -> None:
        """Matrix products take their workspaces for good, and scratch for their duration."""
        if func._schema.name not in PRODUCTS:
            return
        self.cuda.hold_workspaces(index, torch._C._current_autograd_node() is not None)
        if self.cuda.scratch:
            key = self.cuda.next_number()
            self.cuda.allocate(index, key, self.cuda.scratch)
            self.cuda.memories[index].model.free(key)

    def _free(self, index: int, key: int) -> None:
        with self._lock:
            self._graves.pop(key, None)
            self.cuda.memories[index].model.free(key)

    def _is_device(self, value: Any) -> bool:
        return any(
            isinstance(leaf, torch.Tensor) and self._place(leaf).device is not None for leaf in tree_leaves(value)
        )

    def _device_of(self, values: list[Any]) -> int:
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        return next(index for leaf in leaves if (index := self._place(leaf).device) is not None)

    def host_writes(self, tensor: torch.Tensor) -> None:
        """The host is about to fill a buffer.

        Raises:
            RaceError: a copy from it may still be under way.
        """
        storage = tensor.untyped_storage()
        place = self.known.get(storage) if storage in self.known else None
        if place is not None and place.copied is not None:
            queue, number = place.copied
            if self.cuda.checker.syncs.host_sync_state.get(queue, 0) < number:
                raise RaceError(f"the host fills a buffer that queue {queue} may still be copying from")


class _Devices(TorchFunctionMode):
    """Says of tensors which device they are on, also within functions of torch that ask for it in C++."""

    def __init__(self, mode: _Mode):
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__ and type(args[0]) in (torch.Tensor, torch.nn.Parameter):  # type: ignore[attr-defined]
            real = func(*args)
            place = self._mode._place(args[0]) if real.type == "cpu" else None
            return real if place is None or place.device is None else torch.device("cuda", place.device)
        if func in _TO_HOST and (copy := self._on_host(func, args, kwargs or {})) is not None:
            return copy
        if func is torch.nn.functional.one_hot and args[1] > 0:
            return args[0].new_zeros((*args[0].shape, args[1])).scatter_(-1, args[0].unsqueeze(-1), 1)
        return func(*args, **(kwargs or {}))

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """A host copy of a tensor of the device, where one is asked for; in C++ it is on the host already."""
        if type(args[0]) not in (torch.Tensor, torch.nn.Parameter) or self._mode._place(args[0]).device is None:
            return None
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert a tensor of a simulated GPU to numpy; copy it to the host first")
        asked = "cpu" if func is torch.Tensor.cpu else kwargs.get("device", args[1] if len(args) > 1 else None)
        if not isinstance(asked, str | torch.device) or torch.device(asked).type != "cpu":
            return None
        copy = torch.empty(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        return copy.copy_(args[0])


_TO_HOST = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.numpy)


def _argument(func: Any, name: str) -> Any:
    return next((each for each in func._schema.arguments if each.name == name), None)


@contextmanager
def simulated_cuda(**how: Any) -> Iterator[SimulatedCuda]:
    """A scope in which this machine has simulated GPUs; see ``SimulatedCuda``."""
    cuda = SimulatedCuda(**how)
    read = LatentFile.read

    def reads(file: LatentFile, rows: Any, out: torch.Tensor) -> Any:
        if cuda.mode is not None:
            cuda.mode.host_writes(out)
        return read(file, rows, out)

    no_traces = SimpleNamespace(
        StackSummary=SimpleNamespace(extract=lambda *arguments, **named: []), walk_stack=lambda frame: []
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(devices, "_cuda", cuda))
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))  # which torch asks before it dispatches
        stack.enter_context(mock.patch.object(LatentFile, "read", reads))
        stack.enter_context(mock.patch.object(sanitizer, "traceback", no_traces))
        yield cuda
