"""The model of the caching allocator: by hand, against a slow twin, by property, and on a GPU.

``pytest tests/memory/test_allocator.py``
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.memory.allocator import CachingAllocatorModel, rounded_bytes, segment_bytes
from edgetrain.units import MIB

KIB = 1024


# --- by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "rounded", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # rounded first, then judged
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (33 * MIB, 33 * MIB, 34 * MIB),
    ],
)
def test_requests_and_segments_are_rounded_as_pytorch_rounds(size: int, rounded: int, segment: int) -> None:
    assert rounded_bytes(size) == rounded
    assert segment_bytes(size) == segment
    model = CachingAllocatorModel()
    model.alloc(0, size)
    assert model.requested_bytes == size
    assert model.reserved_bytes == segment


def test_small_requests_share_a_segment() -> None:
    model = CachingAllocatorModel()
    for key in range(4):
        model.alloc(key, 512 * KIB)
    assert model.reserved_bytes == 2 * MIB
    model.alloc(4, 1)
    assert (model.reserved_bytes, model.allocated_bytes) == (4 * MIB, 2 * MIB + 512)


def test_the_last_512_bytes_are_a_block_in_the_small_pool() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, MIB)
    model.alloc(1, MIB - 512)
    model.alloc(2, 512)
    assert (model.reserved_bytes, model.allocated_bytes) == (2 * MIB, 2 * MIB)


def test_a_remainder_of_one_mib_is_handed_out_in_the_large_pool() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 9 * MIB + 512 * KIB)
    model.alloc(1, 9 * MIB + 512 * KIB)  # takes all 10.5 MiB that are left: 1 MiB is not enough for a block
    assert model.reserved_bytes == 20 * MIB
    assert model.allocated_bytes == 20 * MIB
    assert model.requested_bytes == 19 * MIB


def test_a_remainder_above_one_mib_is_split_off_in_the_large_pool() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 9 * MIB)
    model.alloc(1, 9 * MIB)
    model.alloc(2, 2 * MIB)
    assert (model.reserved_bytes, model.allocated_bytes) == (20 * MIB, 20 * MIB)


def test_a_large_request_below_its_rounded_segment_keeps_the_remainder() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 11 * MIB)  # a segment of 12 MiB, whose last MiB is too small to split off
    assert (model.reserved_bytes, model.allocated_bytes) == (12 * MIB, 12 * MIB)


def test_a_free_block_is_used_before_a_new_segment_is_taken() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 30 * MIB)
    model.free(0)
    assert (model.allocated_bytes, model.reserved_bytes) == (0, 30 * MIB)
    model.alloc(1, 5 * MIB)  # from the 30 MiB, not from a new 20 MiB
    model.alloc(2, 25 * MIB)
    assert (model.allocated_bytes, model.reserved_bytes) == (30 * MIB, 30 * MIB)


def test_the_smallest_sufficient_block_is_taken() -> None:
    model = CachingAllocatorModel()
    for key, size in enumerate((40 * MIB, 12 * MIB, 20 * MIB)):
        model.alloc(key, size)
    for key in range(3):
        model.free(key)
    model.alloc(3, 12 * MIB)
    model.alloc(4, 20 * MIB)
    model.alloc(5, 40 * MIB)
    assert model.reserved_bytes == 72 * MIB


def test_equal_blocks_are_taken_by_address() -> None:
    model = CachingAllocatorModel()
    for key in range(3):
        model.alloc(key, 10 * MIB)
    for key in (2, 0, 1):
        model.free(key)
    model.alloc(9, 10 * MIB)
    assert [block.address for block in model.blocks() if block.key == 9] == [0]


def test_neighbours_merge_when_released() -> None:
    model = CachingAllocatorModel()
    for key, size in enumerate((6 * MIB, 6 * MIB, 8 * MIB)):
        model.alloc(key, size)
    model.free(0)
    model.free(2)
    assert [block.size // MIB for block in model.blocks()] == [6, 6, 8]
    model.free(1)  # joins both sides
    assert [(block.size // MIB, block.key) for block in model.blocks()] == [(20, None)]
    model.alloc(3, 19 * MIB + 512 * KIB)
    assert model.reserved_bytes == 20 * MIB


def test_the_pools_do_not_lend_to_each_other() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 2 * MIB)  # leaves 18 MiB free in the large pool
    model.alloc(1, MIB)
    assert model.reserved_bytes == 22 * MIB


def test_emptying_the_cache_spares_segments_in_use() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 2 * MIB)
    model.alloc(1, 2 * MIB)
    model.alloc(2, 64 * MIB)
    model.free(1)
    model.free(2)
    assert model.empty_cache() == 64 * MIB
    assert model.reserved_bytes == 20 * MIB
    assert model.peak_reserved_bytes == 84 * MIB


def test_at_the_limit_the_cache_goes_first_and_then_memory_is_out() -> None:
    model = CachingAllocatorModel(limit_bytes=40 * MIB)
    model.alloc(0, 30 * MIB)
    model.free(0)
    model.alloc(1, 40 * MIB)  # fits once the cached 30 MiB are returned
    assert model.reserved_bytes == 40 * MIB
    with pytest.raises(MemoryError, match=f"would reserve {42 * MIB} bytes .* limit is {40 * MIB}"):
        model.alloc(2, 1)
    assert (model.reserved_bytes, model.requested_bytes) == (40 * MIB, 40 * MIB)
    model.free(1)
    model.alloc(2, 1)  # the failed key was not taken
    assert model.peak_reserved_bytes == 40 * MIB


def test_a_request_of_nothing_holds_nothing() -> None:
    model = CachingAllocatorModel(limit_bytes=0)
    model.alloc(0, 0)
    model.free(0)
    assert model.peak_reserved_bytes == 0


def test_peaks_begin_anew_from_what_is_held() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 30 * MIB)
    model.free(0)
    model.reset_peaks()
    assert (model.peak_allocated_bytes, model.peak_reserved_bytes) == (0, 30 * MIB)


def test_our_own_mistakes_are_refused() -> None:
    model = CachingAllocatorModel()
    model.alloc(0, 512)
    with pytest.raises(ValueError, match="key 0 is alive"):
        model.alloc(0, 512)
    with pytest.raises(ValueError, match="-1 bytes"):
        model.alloc(1, -1)
    with pytest.raises(KeyError):
        model.free(7)


def test_thousands_of_requests_take_milliseconds() -> None:
    draw = random.Random(0)
    model = CachingAllocatorModel()
    live: list[int] = []
    start = time.perf_counter()
    for key in range(10_000):
        model.alloc(key, draw.choice((700, 40_000, 3 * MIB, 15 * MIB)))
        live.append(key)
        if len(live) > 200:
            model.free(live.pop(draw.randrange(len(live))))
    # 30 ms on the two-core test machine; the bound only catches a quadratic slip.
    assert time.perf_counter() - start < 2


# --- against a slow twin ----------------------------------------------------------------------


class NaiveAllocator:
    """The same rules written for the eye: segments are lists of ``[size, key]``, searched from end to end."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[list[int | None]]]] = []

    def alloc(self, key: int, size: int) -> None:
        need = -(-size // 512) * 512
        small = need <= MIB
        fits = [
            (block[0], number, place)
            for number, (is_small, blocks) in enumerate(self.segments)
            for place, block in enumerate(blocks)
            if is_small == small and block[1] is None and block[0] >= need
        ]
        if fits:
            _, number, place = min(fits)
        else:
            total = 2 * MIB if small else 20 * MIB if need < 10 * MIB else -(-need // (2 * MIB)) * 2 * MIB
            self.segments.append((small, [[total, None]]))
            number, place = len(self.segments) - 1, 0
        blocks = self.segments[number][1]
        rest = blocks[place][0] - need
        if rest >= 512 if small else rest > MIB:
            blocks[place : place + 1] = [[need, key], [rest, None]]
        else:
            blocks[place][1] = key

    def free(self, key: int) -> None:
        for number, (small, blocks) in enumerate(self.segments):
            joined: list[list[int | None]] = []
            for size, owner in blocks:
                owner = None if owner == key else owner
                if owner is None and joined and joined[-1][1] is None:
                    joined[-1][0] += size
                else:
                    joined.append([size, owner])
            self.segments[number] = (small, joined)

    def empty_cache(self) -> None:
        self.segments = [(small, b) for small, b in self.segments if len(b) > 1 or b[0][1] is not None]

    @property
    def layout(self) -> list[list[tuple[int, int | None]]]:
        return [[(size, key) for size, key in blocks] for _, blocks in self.segments]


SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 2 * MIB),
    st.integers(1, 45 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 5 * MIB, 10 * MIB, 20 * MIB]),
)
# A number releases one of the live requests; None empties the cache.
STEPS = st.lists(
    st.one_of(
        SIZES.map(lambda size: ("alloc", size)),
        st.integers(0, 99).map(lambda pick: ("free", pick)),
        st.just(("empty", 0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_the_model_agrees_with_the_slow_twin(steps: list[tuple[str, int]]) -> None:
    model, twin = CachingAllocatorModel(), NaiveAllocator()
    live: list[int] = []
    for key, (what, number) in enumerate(steps):
        if what == "alloc":
            model.alloc(key, number)
            twin.alloc(key, number)
            live.append(key)
        elif what == "empty":
            model.empty_cache()
            twin.empty_cache()
        elif live:
            released = live.pop(number % len(live))
            model.free(released)
            twin.free(released)
        assert layout_of(model) == twin.layout


def layout_of(model: CachingAllocatorModel) -> list[list[tuple[int, int | None]]]:
    segments: dict[int, list[tuple[int, int | None]]] = {}
    for block in model.blocks():
        segments.setdefault(block.segment, []).append((block.size, block.key))
    return list(segments.values())


# --- by property ------------------------------------------------------------------------------


@given(STEPS, st.one_of(st.none(), st.integers(0, 120 * MIB)))
@settings(max_examples=150)
def test_the_books_balance_and_the_limit_holds(steps: list[tuple[str, int]], limit: int | None) -> None:
    model = CachingAllocatorModel(limit_bytes=limit)
    live: dict[int, int] = {}
    for key, (what, number) in enumerate(steps):
        peaks = (model.peak_allocated_bytes, model.peak_reserved_bytes)
        if what == "alloc":
            try:
                model.alloc(key, number)
                live[key] = number
            except MemoryError:
                assert limit is not None
        elif what == "empty":
            model.empty_cache()
        elif live:
            released = sorted(live)[number % len(live)]
            model.free(released)
            del live[released]
        check_books(model, live)
        assert model.peak_allocated_bytes >= max(peaks[0], model.allocated_bytes)
        assert model.peak_reserved_bytes >= max(peaks[1], model.reserved_bytes)
        assert limit is None or model.peak_reserved_bytes <= limit
    for key in list(live):
        model.free(key)
    model.empty_cache()
    assert (model.requested_bytes, model.allocated_bytes, model.reserved_bytes) == (0, 0, 0)
    assert not list(model.blocks())


def check_books(model: CachingAllocatorModel, live: dict[int, int]) -> None:
    """Blocks tile their segments, no two overlap, no two free ones touch, and the sums are as claimed."""
    blocks = list(model.blocks())
    for left, right in pairwise(blocks):
        assert left.address + left.size <= right.address
        if left.segment == right.segment:
            assert left.address + left.size == right.address
            assert left.key is not None or right.key is not None
    owned = {block.key: block.size for block in blocks if block.key is not None}
    assert owned.keys() == live.keys()
    assert all(owned[key] >= size for key, size in live.items())
    assert model.requested_bytes == sum(live.values())
    assert model.allocated_bytes == sum(owned.values())
    assert model.reserved_bytes == sum(block.size for block in blocks)
    assert model.reserved_bytes >= model.allocated_bytes >= model.requested_bytes


# --- on a GPU ---------------------------------------------------------------------------------

# A process of its own: blocks that other tests left in the cache would change every number.
GPU_REPLAY = """
import json, sys, torch
live, seen = {}, []
for key, size in json.load(sys.stdin):
    if size is None:
        del live[key]
    else:
        live[key] = torch.empty(size, dtype=torch.uint8, device="cuda")
    stats = torch.cuda.memory_stats()
    names = ("requested_bytes", "allocated_bytes", "reserved_bytes")
    seen.append([stats[name + ".all." + end] for name in names for end in ("current", "peak")])
print(json.dumps(seen))
"""


def training_steps() -> list[tuple[int, int | None]]:
    """Requests and releases as one cell's steps make them: weights stay, activations and gradients go."""
    weights = [4 * 1000 * 1000, 4 * 1000, 4 * 1000 * 10]
    trace: list[tuple[int, int | None]] = list(enumerate(3 * weights))
    key = len(trace)
    for batch in (256, 256, 100):
        sizes = [4 * batch * 1000, 4 * batch * 1000, 4 * batch * 10, *weights, 24 * MIB // 256 * batch]
        keys = range(key, key + len(sizes))
        trace += zip(keys, sizes, strict=True)
        trace += [(gone, None) for gone in reversed(keys)]
        key += len(sizes)
    return trace


@pytest.mark.gpu
def test_the_model_agrees_with_the_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    trace = training_steps()
    done = subprocess.run(
        [sys.executable, "-c", GPU_REPLAY],
        input=json.dumps(trace),
        capture_output=True,
        text=True,
        check=True,
    )
    model = CachingAllocatorModel()
    for (key, size), measured in zip(trace, json.loads(done.stdout), strict=True):
        if size is None:
            model.free(key)
        else:
            model.alloc(key, size)
        assert [model.requested_bytes, model.allocated_bytes, model.reserved_bytes] == measured[::2]
        assert [model.peak_allocated_bytes, model.peak_reserved_bytes] == measured[3::2]
