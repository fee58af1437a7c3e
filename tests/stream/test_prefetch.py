"""A thread that stays ahead of its consumer and ends with it. ``pytest tests/stream/test_prefetch.py``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.stream.prefetch import Prefetcher


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run ``work`` in a thread; fail when it hangs."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return found[0] if found else None


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "edgetrain-prefetch"]


def numbers(count: int) -> Callable[[], Iterator[int]]:
    return lambda: iter(range(count))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(items=st.lists(st.integers() | st.text(), max_size=20), depth=st.integers(0, 5))
def test_items_come_in_the_order_in_which_they_were_made(items: list[Any], depth: int) -> None:
    with Prefetcher(lambda: iter(items), depth) as ahead:
        assert within(10, lambda: list(ahead)) == items


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_thread_works_ahead_but_not_further_than_asked(depth: int) -> None:
    made: list[int] = []

    def produce() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    with Prefetcher(produce, depth) as ahead:
        items = iter(ahead)
        assert next(items) == 0
        until = time.monotonic() + 5
        while len(made) < depth + 2 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.15)
        assert len(made) == depth + 2  # one taken, depth waiting, one in the thread's hand


def test_depth_0_makes_each_item_when_it_is_asked_for_in_the_same_thread() -> None:
    made: list[tuple[int, int]] = []

    def produce() -> Iterator[int]:
        for number in range(5):
            made.append((number, threading.get_ident()))
            yield number

    with Prefetcher(produce, 0) as ahead:
        assert made == []
        items = iter(ahead)
        assert next(items) == 0
        assert made == [(0, threading.get_ident())]
        assert threads() == []


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_error_is_raised_where_the_consumer_stands_after_all_items_before_it(depth: int, after: int) -> None:
    def produce() -> Iterator[int]:
        yield from range(after)
        raise KeyError("broken")

    got: list[int] = []

    def consume() -> None:
        with Prefetcher(produce, depth) as ahead, pytest.raises(KeyError, match="broken"):
            for item in ahead:
                got.append(item)

    within(10, consume)
    assert got == list(range(after))
    assert threads() == []


def test_an_error_at_the_start_is_raised_too() -> None:
    def produce() -> Iterator[int]:
        raise OSError("no file")

    with Prefetcher(produce, 2) as ahead, pytest.raises(OSError, match="no file"):
        next(iter(ahead))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_ends_a_thread_that_is_blocked_on_a_full_queue(taken: int) -> None:
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    def leave() -> list[int]:
        with Prefetcher(endless, 2) as ahead:
            items = iter(ahead)
            got = [next(items) for _ in range(taken)]
            time.sleep(0.05)  # let the queue fill
        return got

    assert within(10, leave) == list(range(taken))
    assert threads() == []


def test_closing_twice_is_harmless() -> None:
    ahead = Prefetcher(numbers(100), 2)
    within(10, ahead.close)
    within(10, ahead.close)
    assert threads() == []


def test_an_error_of_the_consumer_passes_and_the_thread_ends() -> None:
    def consume() -> None:
        with pytest.raises(ZeroDivisionError), Prefetcher(numbers(100), 2) as ahead:
            for item in ahead:
                _ = 1 // (item - 1) if item == 1 else None

    within(10, consume)
    assert threads() == []


@pytest.mark.parametrize("depth", [0, 1])
def test_time_spent_waiting_is_counted(depth: int) -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.03)
            yield number

    with Prefetcher(slow, depth) as ahead:
        assert list(ahead) == [0, 1, 2]
    assert 0.05 < ahead.waited_s < 5


def test_a_consumer_that_is_slower_than_the_thread_hardly_waits() -> None:
    with Prefetcher(numbers(10), 4) as ahead:
        for _ in ahead:
            time.sleep(0.01)
    assert ahead.waited_s < 0.05
