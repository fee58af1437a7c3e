"""When a run is to end early: a signal, or the time that the user allowed.

The first signal lets the step that is under way finish; the trainer then saves a checkpoint and raises ``Stopped``.
A second one ends the process at once, as it would have without us.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """Whether a run was asked to end.

    Args:
        say: shows a line to the user.
        time_limit: seconds from now, or ``None``.
    """

    def __init__(self, say: Callable[[str], None], time_limit: float | None = None):
        self._say = say
        self._limit = time_limit
        self.began = time.monotonic()
        self._end = None if time_limit is None else self.began + time_limit
        self._signal: signal.Signals | None = None
        self._said = False

    def asked(self) -> bool:
        """Whether to end now."""
        if self._signal is not None and not self._said:
            self._said = True
            self._say(f"{self._signal.name}: finishing the step and saving a checkpoint; a second signal ends at once")
        return self._signal is not None or (self._end is not None and time.monotonic() >= self._end)

    @property
    def why(self) -> str:
        """What asked for it."""
        return f"--time-limit {self._limit}" if self._signal is None else self._signal.name

    @property
    def exit_code(self) -> int:
        """What the shell sees: 128 and the signal's number; the time limit stops as SIGTERM does."""
        return 128 + int(self._signal or signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A scope in which signals are taken as requests; only in the main thread, and not those that are ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

        def restore() -> None:
            for number in heard:
                signal.signal(number, before[number])

        def hear(number: int, frame: FrameType | None) -> None:
            if self._signal is None:
                self._signal = signal.Signals(number)
                return
            restore()
            signal.raise_signal(number)

        try:
            for number in heard:
                signal.signal(number, hear)
            yield
        finally:
            restore()
