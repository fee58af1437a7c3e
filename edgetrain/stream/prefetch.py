"""A background thread that stays a few items ahead of its consumer, and ends with it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END, _NOTHING = object(), object()
_POLL = 0.1  # seconds between looks at whether the other side is still there


class Prefetcher(Generic[T]):
    """Iterates over what ``produce`` yields, computed ahead in a thread.

    An error in the thread is raised where the consumer stands. ``close`` (or leaving the ``with``
    block) ends the thread even when it is blocked on a full queue.

    Args:
        produce: starts the iteration.
        depth: items kept ready; 0 computes each item when it is asked for, in the consumer's thread.
    """

    def __init__(self, produce: Callable[[], Iterator[T]], depth: int):
        self.waited_s = 0.0
        self._produce = produce
        self._stop = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(max(depth, 1))
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._thread = threading.Thread(target=self._run, name="edgetrain-prefetch", daemon=True)
            self._thread.start()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        if self._thread is None:
            yield from self._timed(self._produce())
            return
        while True:
            item = self._take()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            item = next(items, _END)
            self.waited_s += time.perf_counter() - start
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def _take(self) -> Any:
        start = time.perf_counter()
        while (item := self._poll()) is _NOTHING:
            if self._thread is not None and not self._thread.is_alive() and self._queue.empty():
                raise RuntimeError("the prefetch thread died without a word")
        self.waited_s += time.perf_counter() - start
        return item

    def _poll(self) -> Any:
        """The next item, or ``_NOTHING`` after a while without one."""
        try:
            return self._queue.get(timeout=_POLL)
        except queue.Empty:
            return _NOTHING

    def _run(self) -> None:
        try:
            for item in self._produce():
                if not self._put(item):
                    return
            self._put(_END)
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Whether the item was taken before the consumer left."""
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return True
        return False
