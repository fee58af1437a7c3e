"""The errors that a user can meet, each with the exit code that the shell sees.

An error's message is one line: where, what was found, what was expected, what to do.
"""

from __future__ import annotations


class EdgetrainError(Exception):
    """Root of every error that edgetrain raises on purpose; on its own it is our own bug."""

    exit_code = 70


class InputError(EdgetrainError):
    """What the user gave is wrong: a flag, a spec, a profile, a data set's contents."""

    exit_code = 2


class StorageError(EdgetrainError):
    """The disk refused: full, read-only, or an I/O error."""

    exit_code = 3


class CorruptError(EdgetrainError):
    """A file of ours does not hold what was written to it."""

    exit_code = 4


class DamagedLatentsError(CorruptError):
    """Latents are not as they were written; finished cells can make them again."""


class BusyError(EdgetrainError):
    """Another process works in this run folder."""

    exit_code = 5


class BudgetError(EdgetrainError):
    """The stated memory or disk budget cannot hold the run."""

    exit_code = 6


class DivergedError(EdgetrainError):
    """Training produced a loss that is not finite."""

    exit_code = 7


class Stopped(BaseException):
    """Training was asked to stop, by a signal or a time limit; what was done is committed.

    Like ``KeyboardInterrupt`` it is no ``Exception``: code that goes on after errors must not go on after this.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class EdgetrainWarning(UserWarning):
    """Something is not as it should be, and edgetrain goes on without it."""
