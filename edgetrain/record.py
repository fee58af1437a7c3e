"""What a run measured: the one source of every table, page and JSON that is made from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
_LARGEST = 1 << 62
KINDS = ("weights", "optimizer state", "gradients", "activations", "latents", "workspace")

_TRAINED = (
    "epochs",
    "train_loss",
    "train_accuracy",
    "losses",
    "accuracies",
    "seconds",
    "waited_seconds",
    "peak_gpu_mb",
)


@dataclass
class CellRecord:
    """Of one cell. Memory in MiB, times in seconds; ``None`` is unknown or does not apply.

    Attributes:
        train_loss: mean loss of the last epoch, as it was trained; ``losses`` of every epoch.
        train_accuracy: likewise, where the rule has scores; ``accuracies`` of every epoch.
    """

    name: str
    params: int
    epochs: int = 0
    train_loss: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    peak_gpu_mb: float | None = None
    predicted_peak_mb: float | None = None
    seconds: float = 0.0
    waited_seconds: float = 0.0
    tiles: int = 1
    micro_batch: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float | None] = field(default_factory=list)

    def restore(self, values: dict[str, Any]) -> None:
        """Take up what training had measured when it was committed.

        Raises:
            KeyError: something is missing.
            TypeError: it is no number, or no list of them.
        """
        for name in _TRAINED:
            value = values[name]
            numbers = value if isinstance(value, list) else [value]
            of_list = name in ("losses", "accuracies")
            if isinstance(value, list) != of_list or any(type(n) not in (int, float, NoneType) for n in numbers):
                raise TypeError(f"{name} is {str(value)[:40]}")
            setattr(self, name, value)

    def add(self, epoch: int, share_before: float, loss: float, accuracy: float | None) -> None:
        """Take in a visit's mean loss and accuracy.

        Args:
            epoch: from 0.
            share_before: of the epoch's samples that earlier visits have seen.
            loss: mean.
            accuracy: fraction right, or ``None``.
        """
        if share_before and len(self.losses) > epoch:
            loss = share_before * (self.train_loss or 0.0) + (1 - share_before) * loss
            before = self.train_accuracy
            known = accuracy is not None and before is not None
            accuracy = share_before * (before or 0.0) + (1 - share_before) * (accuracy or 0.0) if known else None
        rounded = None if accuracy is None else float(f"{accuracy:.6g}")  # these stand in every commit
        self.losses[epoch:], self.accuracies[epoch:] = [float(f"{loss:.6g}")], [rounded]
        self.epochs, self.train_loss, self.train_accuracy = epoch + 1, loss, accuracy


@dataclass
class MemorySeries:
    """What lives on the device in the course of a visit, as the dry run of its first steps foresees it.

    Attributes:
        name: of the cell.
        first: number of the first of these cells, from 1; ``count``: how many such visits follow each other.
        peak_mb: live MiB at most; on CUDA more than that is reserved.
        peak_at: the operation that reaches it, and in which pass.
        mb: MiB by kind, [points][kinds], in the order of ``KINDS``; of each stretch the highest.
    """

    name: str
    count: int
    peak_mb: float
    peak_at: str
    mb: list[list[float]]
    first: int = 1

    def __post_init__(self) -> None:
        if not self.mb or any(len(row) != len(KINDS) for row in self.mb):
            raise TypeError(f"{self.name[:40]!r} holds no MiB by kind")


@dataclass
class RunRecord:
    """Of a whole run; see ``CellRecord`` for units.

    Attributes:
        rows: training samples; ``epochs``: of each cell.
        input: what the training rows are and how they were read.
        test_accuracy: fraction of the test rows right by the method's own vote.
        votes: the same for every vote the method has: ``sum``, ``last``, ``trained``, and ``cells``.
        peak_gpu_mb: reserved memory on CUDA, live device-side bytes elsewhere.
        disk_mb: the most that the run folder held; of that, ``latents_mb`` the caches between cells.
        written_mb: bytes written in all (flash wears out).
        energy_j: joules that the device took, as ``energy_source`` told.
        waited_seconds: time in which the device waited for data; ``commit_seconds``: for commits.
        readout: the trained classifier, if there is one.
        edits: what was changed after the run was first finished (``edgetrain cells``).
        plan: its choices, in sentences.
        bp_predicted_peak_mb: of backpropagation on the same net, batch and optimizer, for local rules.
        memory: of the visits, in order; ``bp_memory``: of backpropagation on the same net, batch and optimizer, or
            ``None`` where the method is a baseline itself, or the net too deep for a dry run of the whole of it.
    """

    run: str
    method: str
    schedule: str | None
    device: str
    seed: int
    rows: int = 0
    input: str = ""
    epochs: int = 0
    test_accuracy: float | None = None
    votes: dict[str, Any] = field(default_factory=dict)
    budget_mb: float | None = None
    peak_gpu_mb: float | None = None
    predicted_peak_mb: float | None = None
    context_mb: float | None = None
    peak_host_mb: float | None = None
    disk_mb: float | None = None
    latents_mb: float | None = None
    written_mb: float | None = None
    seconds: float = 0.0
    waited_seconds: float = 0.0
    commit_seconds: float = 0.0
    energy_j: float | None = None
    energy_source: str | None = None
    placement: str = "stream"
    cells: list[CellRecord] = field(default_factory=list)
    readout: CellRecord | None = None
    citations: list[str] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    bp_predicted_peak_mb: float | None = None
    memory: list[MemorySeries] = field(default_factory=list)
    bp_memory: MemorySeries | None = None

    @property
    def joules_per_epoch(self) -> float | None:
        """Of all cells; a trained classifier's epochs are spread over them."""
        return None if self.energy_j is None or not self.epochs else self.energy_j / self.epochs

    @property
    def joules_per_sample(self) -> float | None:
        """Of one training sample in one epoch of all cells."""
        epoch = self.joules_per_epoch
        return None if epoch is None or not self.rows else epoch / self.rows

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def parsed(kind: type[T], values: Any) -> T:
    """A record from plain JSON values; what is not there has its default.

    Raises:
        TypeError: a value is not of its field's type, or a field is missing or unknown.
        ValueError: a text or a number is none that can be shown.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{str(values)[:40]!r} for a {kind.__name__}")
    hints = get_type_hints(kind)
    if unknown := set(values) - {each.name for each in fields(kind)}:  # type: ignore[arg-type]
        raise TypeError(f"unknown: {str(min(unknown))[:40]!r}")
    return kind(**{name: _parsed(name, hints[name], value) for name, value in values.items()})


def _parsed(name: str, hint: Any, value: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    if value is None and kinds != [hint]:
        return None
    kind = kinds[0]
    if is_dataclass(kind):
        return parsed(kind, value)  # type: ignore[arg-type]
    if get_origin(kind) is list and isinstance(value, list):
        return [_parsed(name, get_args(kind)[0], each) for each in value]
    if isinstance(value, str) and not value.isascii():
        value.encode()  # a UnicodeEncodeError is a ValueError
    number = type(value) in (int, float)
    if number and not (abs(value) <= _LARGEST if type(value) is int else math.isfinite(value)):
        raise TypeError(f"{name} is {str(value)[:40]}")
    if kind is Any or type(value) is (get_origin(kind) or kind) or (kind is float and number):
        return value
    raise TypeError(f"{name} is {str(value)[:40]!r}")
