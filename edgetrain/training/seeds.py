"""The same run with several seeds: how much of an accuracy is chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetrain.config import Settings
from edgetrain.errors import InputError
from edgetrain.record import RunRecord
from edgetrain.store.edit import open_folder
from edgetrain.store.run import RunFolder
from edgetrain.training.callbacks import Callback
from edgetrain.training.fit import check_folder, fit
from edgetrain.training.resuming import resumed_settings
from edgetrain.training.run import Run


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed only.

    Attributes:
        records: of the runs.
        mean: of their test accuracies, from 0 to 1; ``None`` without test rows.
        std: sample standard deviation of these.
    """

    records: Sequence[RunRecord]
    mean: float | None
    std: float | None

    @classmethod
    def of(cls, records: Sequence[RunRecord]) -> Seeds:
        """The mean and deviation of some runs."""
        found = [record.test_accuracy for record in records if record.test_accuracy is not None]
        if len(found) < len(records):
            return cls(records, None, None)
        return cls(records, statistics.mean(found), statistics.stdev(found))

    def as_dict(self) -> dict[str, Any]:
        """What ``fit --seeds --json`` prints."""
        return {
            "test_accuracy": self.mean,
            "test_accuracy_std": self.std,
            "seeds": len(self.records),
            "runs": [record.as_dict() for record in self.records],
        }


def fit_seeds(
    settings: Settings,
    path: Path,
    seeds: int,
    given: Mapping[str, Any],
    resume: bool = False,
    force: bool = False,
    callback: Callback | None = None,
) -> list[Run]:
    """Train runs with the seeds ``settings.seed``, ``settings.seed + 1``, ... in ``path/seed-N``.

    Args:
        settings: of all runs.
        path: the folder of the run folders.
        seeds: number of runs.
        given: what was stated on the command line, which a run that is resumed is compared with.
        resume: resume runs that were started, and start the others.
        force: replace the runs.
        callback: receives progress and notes.

    Raises:
        InputError: a folder is taken, or a run was started with other settings; before the first run.
        EdgetrainError: see ``training.fit.fit``; finished runs stay.
    """
    if RunFolder(path).is_run():
        raise InputError(f"{path}: holds a run; --seeds needs a folder for several: choose another --run-dir")
    to_train = []
    for seed in range(settings.seed, settings.seed + seeds):
        one, folder = replace(settings, seed=seed), path / f"seed-{seed}"
        started = resume and folder.exists()
        if started:
            one = resumed_settings(folder, {**given, "seed": seed}, one, may_start=True)
        check_folder(open_folder(folder), started, force)
        to_train.append((one, folder, started))
    return [fit(one, folder, resume=started, force=force, callback=callback) for one, folder, started in to_train]
