"""The errors that a user can meet, each with the exit code that the shell sees.

An error's message is one line: where, what was found, what was expected, what to do.
"""

from __future__ import annotations

_SHOWN = 200  # characters of a wrong value in a message
_LONGEST = 2000  # characters; text that a message quotes from a file or flag may be of any length


class EdgetrainError(Exception):
    """Root of every error that edgetrain raises on purpose; on its own it is our own bug.

    Whatever a message quotes, it is one line that a terminal can show.
    """

    exit_code = 70

    def __init__(self, message: str = ""):
        super().__init__(_line(message))


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
    """Training was asked to stop, by a signal or a time limit; what was done is in a checkpoint.

    Like ``KeyboardInterrupt`` it is not an ``Exception``: code that handles errors must not continue after this.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class EdgetrainWarning(UserWarning):
    """Something is not as it should be; edgetrain continues without it."""


class DiagnosticWarning(EdgetrainWarning):
    """A cell does not learn, or a setting is probably a mistake."""


def shown(value: object) -> str:
    """A wrong value as a message quotes it; what is too deep or too long for Python to print, by its type."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} without end"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _line(message: str) -> str:
    """What is not printable (line breaks too) as escapes; without the middle of what is too long."""
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in message)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
