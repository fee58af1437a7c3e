"""The rows of a run's data set as files in its folder."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from edgetrain.data.prepare import Prepared, Statistics, prepare
from edgetrain.store.run import RunFolder
from edgetrain.training.inputs import statistics_of
from edgetrain.training.job import Job


@dataclass(frozen=True)
class Inputs:
    """Latents 0: the prepared rows, and the statistics by which they were prepared."""

    statistics: Statistics
    train: Prepared
    test: Prepared | None
    validation: Prepared | None

    @classmethod
    def prepared(cls, job: Job, folder: RunFolder, prefix: str = "") -> Inputs:
        """Read the data set and write its rows to files in the folder, whose names begin with ``prefix``.

        Raises:
            InputError, CorruptError, StorageError: see ``data.prepare.prepare``; no file is left.
        """
        data = job.data
        assert data.train is not None
        statistics = statistics_of(data, job.work.objective.nonnegative_input, job.settings.normalize)
        done: dict[str, Prepared] = {}
        try:
            for part, name in ((data.train, "000"), (data.test, "test"), (data.validation, "validation")):
                if part is not None:
                    done[name] = prepare(data, part, folder.latents, f"{prefix}{name}", statistics)
        except BaseException:
            for files in done.values():
                for file in filter(None, (files.x, files.y)):
                    file.delete()
            with suppress(OSError):
                folder.latents.rmdir()
            raise
        return cls(statistics, done["000"], done.get("test"), done.get("validation"))

    @property
    def parts(self) -> list[Prepared]:
        """The training rows and, if there are any, the test and validation rows."""
        return [part for part in (self.train, self.test, self.validation) if part is not None]

    @property
    def names(self) -> set[str]:
        """Of the files."""
        return {file.path.name for part in self.parts for file in (part.x, part.y) if file is not None}
