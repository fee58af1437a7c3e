"""What is called as a run progresses: the trainer calls, a report shows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from edgetrain.errors import DiagnosticWarning
from edgetrain.planning.plan import Plan
from edgetrain.record import RunRecord


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        visit: number of the visit, from 0; ``visits``: how many there are.
        name: of the cell; ``node`` its number, ``nodes`` how many there are.
        epoch: from 0, of ``epochs``.
        step: steps done in the epoch, of ``steps``.
        loss: mean of the epoch so far; ``accuracy`` likewise on training data, where the rule has one.
        peak: device bytes of this cell so far; ``budget``: bytes allowed or ``None``.
        elapsed_s: since training began in this process; ``left_s``: estimate, or ``None``.
    """

    visit: int
    visits: int
    name: str
    node: int
    nodes: int
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None
    peak: int
    budget: int | None
    elapsed_s: float
    left_s: float | None


class Callback:
    """Receives the progress of a run. The methods of this class do nothing, except that ``warn`` warns."""

    def planned(self, plan: Plan, record: RunRecord) -> None:
        """The plan fits and the run begins."""

    def note(self, text: str) -> None:
        """Something to know, in a sentence."""

    def warn(self, text: str) -> None:
        """Something that probably needs attention, such as a cell that does not learn; by default a Python warning."""
        warnings.warn(DiagnosticWarning(text), stacklevel=2)

    def stepped(self, progress: Progress) -> None:
        """Some steps were done; called a few times a second at most."""

    def visited(self, progress: Progress) -> None:
        """A visit ended."""

    def finished(self, record: RunRecord) -> None:
        """The run is complete."""


class CallbackList(Callback):
    """Calls several callbacks in turn."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = callbacks

    def planned(self, plan: Plan, record: RunRecord) -> None:
        """See ``Callback``."""
        for callback in self._callbacks:
            callback.planned(plan, record)

    def note(self, text: str) -> None:
        """See ``Callback``."""
        for callback in self._callbacks:
            callback.note(text)

    def warn(self, text: str) -> None:
        """See ``Callback``; the first one decides how it is shown."""
        self._callbacks[0].warn(text)

    def stepped(self, progress: Progress) -> None:
        """See ``Callback``."""
        for callback in self._callbacks:
            callback.stepped(progress)

    def visited(self, progress: Progress) -> None:
        """See ``Callback``."""
        for callback in self._callbacks:
            callback.visited(progress)

    def finished(self, record: RunRecord) -> None:
        """See ``Callback``."""
        for callback in self._callbacks:
            callback.finished(record)
