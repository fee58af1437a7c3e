"""One block that a visit takes and gives back before its first tensor, so that CUDA's allocator reserves less.

A request of 1 to 10 MiB takes a segment of 20 MiB, so that about twice as much is reserved as lives. A block of
10 MiB or more gets a segment of its own size; once it is given back, later requests are split off it. How large it
should be is found with the model of the allocator (``memory.allocator``): the visit's requests, recorded in the dry
run, are replayed for several sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from edgetrain.memory.allocator import (
    OWN_SEGMENT_BYTES,
    ROUND_SEGMENT_BYTES,
    SMALL_REQUEST_BYTES,
    CachingAllocatorModel,
    rounded_bytes,
)

_LARGER = 6  # sizes to try, each 2 MiB larger, from what lives at once on


@dataclass
class Requests:
    """What a dry run asks of the allocator, in order; implements ``memory.meter.Listener``.

    Attributes:
        held: bytes of requests that were made before and are never given back.
        events: (key, bytes) of a request, (key, ``None``) of a release.
    """

    held: list[int] = field(default_factory=list)
    events: list[tuple[int, int | None]] = field(default_factory=list)

    def alloc(self, key: int, size: int) -> None:
        """See ``Listener``."""
        self.events.append((key, size))

    def free(self, key: int) -> None:
        """See ``Listener``."""
        self.events.append((key, None))

    def reserved(self, seed: int) -> int:
        """The most bytes that are reserved if a block of ``seed`` bytes is taken and given back first."""
        model = CachingAllocatorModel()
        for key, held in enumerate(self.held, 1):
            model.alloc(-key, held)
        if seed:
            model.alloc(0, seed)
            model.free(0)
        for key, size in self.events:
            if size is None:
                model.free(key)
            else:
                model.alloc(key, size)
        return model.peak_reserved_bytes

    def best_seed(self) -> tuple[int, int]:
        """The size in bytes that reserves least (0: none is worth it), and what is then reserved."""
        sizes = [0, *sorted({*self._candidates(OWN_SEGMENT_BYTES), *self._candidates(None)})]
        reserved, seed = min((self.reserved(size), size) for size in sizes)
        return seed, reserved

    def _candidates(self, below: int | None) -> Iterator[int]:
        """Sizes about as large as what lives at once of the large pool's requests, of those ``below`` a size."""
        live = peak = 0
        sizes: dict[int, int] = {}
        for key, size in self.events:
            if size is None:
                live -= sizes.pop(key, 0)
            elif rounded_bytes(size) > SMALL_REQUEST_BYTES and (below is None or size < below):
                sizes[key] = rounded_bytes(size)
                live += sizes[key]
                peak = max(peak, live)
        if peak:
            least = -(-max(peak, OWN_SEGMENT_BYTES) // ROUND_SEGMENT_BYTES) * ROUND_SEGMENT_BYTES
            yield from (least + step * ROUND_SEGMENT_BYTES for step in range(_LARGER))
