"""Progress of a run as TensorBoard event files in the run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgetrain.errors import InputError
from edgetrain.planning.plan import Plan
from edgetrain.record import RunRecord
from edgetrain.store.atomic import storage_errors
from edgetrain.store.run import TENSORBOARD
from edgetrain.training.callbacks import Callback, CallbackList, Progress
from edgetrain.units import MIB, to_mb


@contextmanager
def logged(callback: Callback, asked: bool = True) -> Iterator[Callback]:
    """The given callback and, if asked, one for TensorBoard, which is closed at the end.

    Raises:
        InputError: the package is not installed.
    """
    if not asked:
        yield callback
        return
    if find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs a package that is not installed; pip install 'edgetrain[tensorboard]'")
    logs = TensorBoardCallback()
    try:
        yield CallbackList([callback, logs])
    finally:
        logs.close()


class TensorBoardCallback(Callback):
    """Writes scalars: loss, training accuracy and peak memory of each cell by its epochs; accuracies at the end."""

    def __init__(self) -> None:
        self._writer: Any = None
        self._folder = Path()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with storage_errors(self._folder):
                self._writer.close()

    def planned(self, plan: Plan, record: RunRecord) -> None:
        """See ``Callback``."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(record.run) / TENSORBOARD
        with storage_errors(self._folder):
            self.close()  # of a first try
            self._writer = SummaryWriter(str(self._folder))
            self._writer.add_scalar("memory/predicted, MiB", to_mb(plan.predicted_peak), 0)
            if plan.budget is not None:
                self._writer.add_scalar("memory/budget, MiB", to_mb(plan.stated_budget), 0)

    def visited(self, progress: Progress) -> None:
        """See ``Callback``."""
        name, epoch = f"{progress.node + 1:03} {progress.name}", progress.epoch + 1
        with storage_errors(self._folder):
            self._writer.add_scalar(f"loss/{name}", progress.loss, epoch)
            if progress.accuracy is not None:
                self._writer.add_scalar(f"training accuracy/{name}", progress.accuracy, epoch)
            self._writer.add_scalar(f"memory/{name}, MiB", progress.peak / MIB, epoch)

    def finished(self, record: RunRecord) -> None:
        """See ``Callback``."""
        with storage_errors(self._folder):
            for vote, accuracy in record.votes.items():
                if isinstance(accuracy, float):
                    self._writer.add_scalar(f"test accuracy/{vote}", accuracy, record.epochs)
            for number, cell in enumerate(record.cells, start=1):
                if cell.test_accuracy is not None:
                    self._writer.add_scalar("test accuracy/by cell", cell.test_accuracy, number)
