"""What a run measured: the one source of every table, page and JSON that is made from it."""

from __future__ import annotations

from copy import copy
from typing import Annotated, Any

from msgspec import Meta, Struct, to_builtins

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
KINDS = ("weights", "optimizer state", "gradients", "activations", "latents", "workspace")

_TRAINED = (
    "epochs",
    "train_loss",
    "train_accuracy",
    "losses",
    "accuracies",
    "evaluations",
    "seconds",
    "waited_seconds",
    "peak_gpu_mb",
)


class Sums(Struct, frozen=True):
    """Sums over a visit's steps: loss over ``samples``, and correct predictions among ``scored``."""

    loss: float = 0.0
    samples: Count = 0
    correct: Count = 0
    scored: Count = 0

    @property
    def means(self) -> tuple[float, float | None]:
        """Mean loss, and accuracy where there are scores."""
        return self.loss / max(self.samples, 1), self.correct / self.scored if self.scored else None


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True):
    """Accuracy in the course of training, from 0 to 1.

    Attributes:
        epoch: after which, from 1.
        accuracy: of the cell's own vote; ``None``: it has none.
        net_accuracy: of the net by the method's vote, of the cells up to this one under ``separate``.
    """

    epoch: Count
    accuracy: float | None
    net_accuracy: float | None


class CellRecord(Struct, forbid_unknown_fields=True):
    """Of one cell. Memory in MiB, times in seconds; ``None`` is unknown or does not apply.

    Attributes:
        train_loss: mean loss of the last epoch, as it was trained; ``losses`` of every epoch.
        train_accuracy: likewise, where the rule has scores; ``accuracies`` of every epoch.
        evaluations: accuracies in the course of training, with ``--evaluate-every``.
    """

    name: str
    params: Count
    epochs: Count = 0
    train_loss: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    peak_gpu_mb: float | None = None
    predicted_peak_mb: float | None = None
    seconds: float = 0.0
    waited_seconds: float = 0.0
    tiles: Count = 1
    micro_batch: Count = 0
    losses: list[float] = []
    accuracies: list[float | None] = []
    evaluations: list[Evaluation] = []

    def restore(self, saved: CellRecord) -> None:
        """Take over what training had measured by a checkpoint."""
        for name in _TRAINED:
            setattr(self, name, copy(getattr(saved, name)))

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
        rounded = None if accuracy is None else float(f"{accuracy:.6g}")  # these are in every checkpoint
        self.losses[epoch:], self.accuracies[epoch:] = [float(f"{loss:.6g}")], [rounded]
        self.epochs, self.train_loss, self.train_accuracy = epoch + 1, loss, accuracy


class MemorySeries(Struct, forbid_unknown_fields=True):
    """What lives on the device in the course of a visit, as the dry run of its first steps predicts it.

    Attributes:
        name: of the cell.
        first: number of the first of these cells, from 1; ``count``: how many such visits follow each other.
        peak_mb: live MiB at most; on CUDA more than that is reserved.
        peak_at: the operation that reaches it, and in which pass.
        mb: MiB by kind, [points][kinds], in the order of ``KINDS``; of each stretch the highest.
    """

    name: str
    count: Count
    peak_mb: float
    peak_at: str
    mb: list[list[float]]
    first: Count = 1

    def __post_init__(self) -> None:
        if not self.mb or any(len(row) != len(KINDS) for row in self.mb):
            raise TypeError(f"{self.name[:40]!r} holds no MiB by kind")


class RunRecord(Struct, forbid_unknown_fields=True):
    """Of a whole run; see ``CellRecord`` for units.

    Attributes:
        rows: training samples; ``epochs``: of each cell.
        input: what the training rows are and how they were read.
        test_accuracy: fraction of the test rows right by ``vote``.
        votes: the same for every vote the method has: ``sum``, ``last``, ``classifier``, and ``cells``.
        vote: by which the run predicts; its own, or chosen by ``validation_votes``.
        validation_votes: fraction of the validation rows right, by vote; empty without ``--validation``.
        evaluated: which rows the cells' ``evaluations`` are of: ``validation`` or ``test``.
        peak_gpu_mb: reserved memory on CUDA, live device-side bytes elsewhere.
        disk_mb: the most that the run folder held; of that, ``latents_mb`` the caches between cells.
        written_mb: bytes written in all (flash wears out).
        energy_j: joules that the device took, as ``energy_source`` told.
        waited_seconds: time in which the device waited for data; ``checkpoint_seconds``: for checkpoints.
        classifier: the trained classifier, if there is one.
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
    rows: Count = 0
    input: str = ""
    epochs: Count = 0
    test_accuracy: float | None = None
    votes: dict[str, Any] = {}
    vote: str | None = None
    validation_votes: dict[str, float] = {}
    evaluated: str | None = None
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
    checkpoint_seconds: float = 0.0
    energy_j: float | None = None
    energy_source: str | None = None
    placement: str = "stream"
    cells: list[CellRecord] = []
    classifier: CellRecord | None = None
    citations: list[str] = []
    edits: list[str] = []
    plan: list[str] = []
    bp_predicted_peak_mb: float | None = None
    memory: list[MemorySeries] = []
    bp_memory: MemorySeries | None = None

    @property
    def visits(self) -> list[CellRecord]:
        """All cells and, last, the classifier if there is one."""
        return [*self.cells, *([] if self.classifier is None else [self.classifier])]

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
        return to_builtins(self)  # type: ignore[no-any-return]
