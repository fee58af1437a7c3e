"""A model of PyTorch's CUDA caching allocator: what it would reserve for a given order of requests.

The budget bounds what the allocator *reserves*, which at small budgets is far above what tensors
need: a request of 1 to 10 MiB takes a segment of 20 MiB. So a prediction of live bytes is not enough
to promise a budget. This model replays requests and releases, on any machine, without torch.

Source: ``DeviceCachingAllocator`` in pytorch's ``c10/cuda/CUDACachingAllocator.cpp``
(``round_size``, ``get_pool``, ``get_allocation_size``, ``get_free_block``, ``should_split``,
``free_block``, ``try_merge_blocks``, ``alloc_block``, ``release_cached_blocks``), and the constants
of ``c10/core/AllocatorConfig.h`` in the torch 2.13 wheel. They were the same in every version read,
from 1.x on; new ones only let a setting change the 20 MiB. The rules, with default settings:

* A request is rounded up to a multiple of 512 bytes; none of zero bytes is ever made.
* Up to 1 MiB it is served from the small pool, otherwise from the large one.
* Best fit: the smallest free block of the pool that is large enough, the lowest address among equals.
* If there is none, a new segment: of 2 MiB (small), of 20 MiB (below 10 MiB), or of the request
  rounded up to 2 MiB.
* The rest of a block is split off if it has at least 512 bytes (small) or more than 1 MiB (large);
  otherwise it is handed out too and counts as allocated.
* A released block merges with free neighbours of its segment. Segments stay reserved until the cache
  is emptied, or until a new one would break the limit: then all wholly free segments of both pools go
  first, and only if that does not help is there an out-of-memory.

Not modelled: more than one stream (each has its own blocks), ``expandable_segments`` and other
``PYTORCH_CUDA_ALLOC_CONF`` settings, memory pools of CUDA graphs, the context, and what libraries
allocate past the allocator. Workspaces that cuBLAS and cuDNN take *from* the allocator are requests
like others: the caller makes them (128 KiB per stream with ``device.configure_cuda``). Addresses of
segments are made up, in the order of their creation; the driver's may order equally large free
blocks otherwise.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

from edgetrain.units import MIB

MIN_BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
"""Requests from here on get a segment of their own size."""
ROUND_SEGMENT_BYTES = 2 * MIB


def rounded_bytes(size: int) -> int:
    """A request as the allocator counts it: a multiple of 512 bytes, at least one."""
    return max(1, -(-size // MIN_BLOCK_BYTES)) * MIN_BLOCK_BYTES


def segment_bytes(size: int) -> int:
    """The segment that a request of ``size`` bytes takes from the driver if no free block serves it."""
    rounded = rounded_bytes(size)
    if rounded <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-rounded // ROUND_SEGMENT_BYTES) * ROUND_SEGMENT_BYTES


class BlockView(NamedTuple):
    """A block as :meth:`CachingAllocatorModel.blocks` shows it."""

    address: int
    size: int
    key: int | None
    """Whose it is; ``None`` for a free block."""
    segment: int
    """The address at which its segment begins."""


class _Block:
    """A stretch of a segment, in a list with its neighbours; the first one begins the segment."""

    __slots__ = ("address", "key", "next", "pool", "previous", "requested", "size")

    def __init__(self, address: int, size: int, pool: _Pool) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.requested = 0
        self.key: int | None = None
        self.previous: _Block | None = None
        self.next: _Block | None = None

    @property
    def is_whole_segment(self) -> bool:
        return self.previous is None and self.next is None

    def splits_at(self, size: int) -> bool:
        """Whether what remains behind ``size`` bytes is worth a block of its own."""
        remainder = self.size - size
        return remainder >= MIN_BLOCK_BYTES if self.pool.is_small else remainder > SMALL_REQUEST_BYTES

    def split(self, size: int) -> _Block:
        """Keep the first ``size`` bytes; the rest, as a new block behind this one, is given back."""
        rest = _Block(self.address + size, self.size - size, self.pool)
        rest.previous, rest.next = self, self.next
        if self.next is not None:
            self.next.previous = rest
        self.next, self.size = rest, size
        return rest

    def absorb_next(self) -> None:
        """Take over the block behind this one."""
        gone = self.next
        assert gone is not None
        self.size += gone.size
        self.next = gone.next
        if gone.next is not None:
            gone.next.previous = self


class _Pool:
    """The free blocks of one size class, ordered by size and then address."""

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        # A sorted list: insertion moves memory, but a pool has dozens of free blocks, not millions.
        # Addresses are unique, so that two blocks are never compared themselves.
        self._free: list[tuple[int, int, _Block]] = []

    def add(self, block: _Block) -> None:
        insort(self._free, (block.size, block.address, block))

    def remove(self, block: _Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.address))]

    def take_best_fit(self, size: int) -> _Block | None:
        """The smallest free block of at least ``size`` bytes, no longer free; ``None`` if there is none."""
        place = bisect_left(self._free, (size,))
        return self._free.pop(place)[2] if place < len(self._free) else None

    def take_whole_segments(self) -> list[_Block]:
        """All free blocks that are a whole segment, no longer here."""
        whole = [entry[2] for entry in self._free if entry[2].is_whole_segment]
        self._free = [entry for entry in self._free if not entry[2].is_whole_segment]
        return whole


class CachingAllocatorModel:
    """Replays requests and releases as PyTorch's CUDA caching allocator would serve them.

    A key is the caller's name for one live request, for example a storage's id; it may be used again
    once released.

    Attributes:
        requested_bytes: what the live requests asked for.
        allocated_bytes: what their blocks hold: rounded up, with remainders too small to split off.
        reserved_bytes: what is taken from the driver.
        peak_allocated_bytes: the highest ``allocated_bytes`` so far.
        peak_reserved_bytes: the highest ``reserved_bytes`` so far; what a budget bounds.
        limit_bytes: the most that may be reserved; ``None`` for no limit.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.requested_bytes = 0
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self._small = _Pool(is_small=True)
        self._large = _Pool(is_small=False)
        self._live: dict[int, _Block | None] = {}
        self._segments: dict[int, _Block] = {}
        self._next_address = 0

    def alloc(self, key: int, size: int) -> None:
        """Serve a request of ``size`` bytes under the name ``key``.

        Zero bytes hold nothing, as in PyTorch, but are to be released all the same.

        Raises:
            MemoryError: it does not fit below the limit, even with the cache emptied (which then it is).
            ValueError: the size is negative, or the key is alive.
        """
        if size < 0:
            raise ValueError(f"a request of {size} bytes; expected 0 or more")
        if key in self._live:
            raise ValueError(f"key {key} is alive; release it before it is used again")
        self._live[key] = self._serve(key, size) if size else None

    def free(self, key: int) -> None:
        """Release what ``key`` holds; it stays reserved.

        Raises:
            KeyError: nothing by that name is alive.
        """
        block = self._live.pop(key)
        if block is None:
            return
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        block.requested, block.key = 0, None
        block.pool.add(_merged(block))

    def empty_cache(self) -> int:
        """Return wholly free segments to the driver, as PyTorch does when its cache is emptied; how many bytes."""
        whole = self._large.take_whole_segments() + self._small.take_whole_segments()
        for block in whole:
            del self._segments[block.address]
        released = sum(block.size for block in whole)
        self.reserved_bytes -= released
        return released

    def reset_peaks(self) -> None:
        """Begin the peaks anew from what is held now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def blocks(self) -> Iterator[BlockView]:
        """Every block by address, free ones included."""
        for start, head in self._segments.items():
            block: _Block | None = head
            while block is not None:
                yield BlockView(block.address, block.size, block.key, start)
                block = block.next

    def _serve(self, key: int, size: int) -> _Block:
        """The block that the request gets, counted."""
        rounded = rounded_bytes(size)
        pool = self._small if rounded <= SMALL_REQUEST_BYTES else self._large
        block = pool.take_best_fit(rounded) or self._new_segment(segment_bytes(size), pool)
        if block.splits_at(rounded):
            pool.add(block.split(rounded))
        block.key, block.requested = key, size
        self.requested_bytes += size
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def _new_segment(self, size: int, pool: _Pool) -> _Block:
        if self._exceeds_limit(size):
            self.empty_cache()
        if self._exceeds_limit(size):
            raise MemoryError(
                f"the allocator would reserve {self.reserved_bytes + size} bytes "
                f"({size} more), the limit is {self.limit_bytes}"
            )
        block = _Block(self._next_address, size, pool)
        self._segments[block.address] = block
        self._next_address += size
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _exceeds_limit(self, size: int) -> bool:
        return self.limit_bytes is not None and self.reserved_bytes + size > self.limit_bytes


def _merged(block: _Block) -> _Block:
    """``block`` joined with its free neighbours, which leave their pool; it is in no pool yet itself."""
    if block.next is not None and block.next.key is None:
        block.pool.remove(block.next)
        block.absorb_next()
    before = block.previous
    if before is not None and before.key is None:
        block.pool.remove(before)
        before.absorb_next()
        return before
    return block
