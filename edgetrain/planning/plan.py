"""A plan: what fits, how, and what it costs. Sizes in bytes; MiB only where a person reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from edgetrain.planning.schedule import WHOLE, Cut
from edgetrain.record import Count
from edgetrain.units import ceil_mb, show_mb, to_mb

Size = Annotated[int, Meta(ge=1, le=1 << 62)]


@dataclass(frozen=True)
class VisitTime:
    """Seconds of all visits to a cell or to the classifier, and what bounds them.

    Attributes:
        seconds: of the whole run.
        bound: ``compute``, ``bus`` or ``disk``.
    """

    seconds: float
    bound: str


@dataclass(frozen=True)
class RunTimes:
    """What a run will take.

    Attributes:
        visits: of each cell and of the classifier.
        measured: the date on which the machine's rates were measured.
    """

    visits: Sequence[VisitTime]
    measured: str

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(time.seconds for time in self.visits)


@dataclass(frozen=True)
class CellPlan:
    """Of one cell, or of the trained classifier.

    Attributes:
        name: shown to people.
        params: learned numbers, head included.
        micro_batch: samples on the device at once.
        peak: device bytes of a visit.
        latents: bytes on disk of the latents that it emits.
        tiles: pieces in which its units are trained.
        tileable: whether they can be.
        seed: bytes of a block that is taken and given back before it is trained; see ``planning.seeding``.
        evaluation_seed: likewise, before classes are looked for.
    """

    name: str
    params: int
    micro_batch: int
    peak: int
    latents: int
    tiles: int = 1
    tileable: bool = False
    seed: int = 0
    evaluation_seed: int = 0


class Decisions(Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan decided and a resumed run keeps, so that it continues to the same bits.

    Attributes:
        placement: ``stream`` or ``resident``.
        micro_batch: samples on the device at once; a list gives one for each cell and for the classifier.
        tiles: of each cell; likewise.
        ranges: parts of an epoch of which latents are on disk at once.
        cached: latents that ``separate`` caches whole, the others being emitted again; ``None``: all.
    """

    placement: Literal["stream", "resident"]
    micro_batch: Size | list[Size]
    tiles: Size | list[Size] = 1
    ranges: Size = 1
    cached: list[Count] | None = None

    @property
    def cut(self) -> Cut:
        """How much of the latents is on disk at once."""
        return Cut(self.ranges, None if self.cached is None else frozenset(self.cached))


@dataclass(frozen=True)
class Plan:
    """Of a whole run.

    Attributes:
        cells: in order.
        classifier: the trained classifier's, if there is one.
        placement: ``stream`` or ``resident``.
        classifier_resident: whether all of the classifier stays on the device during its visits.
        budget: bytes that PyTorch's allocator may reserve on the device; ``None``: no limit.
        least: finds ``min_budget``, which takes longer than the plan itself.
        predicted_peak: of the device.
        host_bytes: host buffers and cells in transit, without the host tier.
        host_budget: host bytes allowed; ``None``: no limit.
        disk_bytes: the most that the run folder holds.
        disk_budget: disk bytes allowed; ``None``: no limit.
        whole_batch: of a run that does not fit because its batches cannot be split, a smaller batch that would;
            else ``None``.
        splits: whether batches can be split into micro-batches.
        written_bytes: what the run writes in all.
        cut: how much of the latents is on disk at once.
        least_disk: the smallest run folder that would do, in bytes.
        batch_size: samples of a full step.
        remarks: what the method says of how it reads the data.
        spills_batch: whether what waits between the layers of a step (``bp-stream``) is in files.
        outside: bytes of the stated budget that PyTorch's allocator does not get, such as the CUDA context.
    """

    cells: tuple[CellPlan, ...]
    classifier: CellPlan | None
    placement: Literal["stream", "resident"]
    classifier_resident: bool
    budget: int | None
    least: Callable[[], int] = field(repr=False, compare=False)
    predicted_peak: int
    host_bytes: int
    host_budget: int | None
    disk_bytes: int
    disk_budget: int | None
    written_bytes: int
    whole_batch: int | None = None
    splits: bool = True
    cut: Cut = WHOLE
    least_disk: int = 0
    batch_size: int = 0
    remarks: tuple[str, ...] = ()
    outside: int = 0
    spills_batch: bool = False

    @property
    def stated_budget(self) -> int | None:
        """The budget in bytes as ``--max-gpu-mb`` states it; ``None``: no limit."""
        return None if self.budget is None else self.budget + self.outside

    @property
    def beside(self) -> str:
        """What has to be said behind a peak where a part of the stated budget is outside PyTorch's allocator."""
        return f" and {show_mb(self.outside)} outside PyTorch's allocator" if self.outside else ""

    @cached_property
    def min_budget(self) -> int:
        """The smallest budget in bytes that can be stated, with the smallest micro-batches and the most tiles."""
        return self.least() + self.outside

    @property
    def fits(self) -> bool:
        """Whether the device budget holds it."""
        return self.budget is None or self.predicted_peak <= self.budget

    @property
    def host_fits(self) -> bool:
        """Whether the host budget holds it."""
        return self.host_budget is None or self.host_bytes <= self.host_budget

    @property
    def disk_fits(self) -> bool:
        """Whether the disk budget holds it."""
        return self.disk_budget is None or self.disk_bytes <= self.disk_budget

    @property
    def spare_disk(self) -> int | None:
        """Bytes of the disk budget that the run does not need; ``None``: no limit."""
        return None if self.disk_budget is None else self.disk_budget - self.disk_bytes

    @property
    def visits(self) -> tuple[CellPlan, ...]:
        """All cells and, last, the classifier."""
        return self.cells if self.classifier is None else (*self.cells, self.classifier)

    @property
    def tiles(self) -> list[int]:
        """Of each cell and of the classifier."""
        return [cell.tiles for cell in self.visits]

    @property
    def micro_batches(self) -> list[int]:
        """Of each cell and of the classifier."""
        return [cell.micro_batch for cell in self.visits]

    @property
    def decisions(self) -> Decisions:
        """What a resumed run keeps."""
        cached = None if self.cut.cached is None else sorted(self.cut.cached)
        return Decisions(
            self.placement, one_if_equal(self.micro_batches), one_if_equal(self.tiles), self.cut.ranges, cached
        )

    def as_dict(self, bp_peak: int | None, times: RunTimes | None = None) -> dict[str, Any]:
        """What ``plan --json`` prints; times are unknown where the machine's rates are."""
        each: Sequence[VisitTime | None] = [None] * len(self.visits) if times is None else times.visits
        return {
            "fits": self.fits,
            "host_fits": self.host_fits,
            "disk_fits": self.disk_fits,
            "placement": self.placement,
            "budget_mb": to_mb(self.stated_budget),
            "min_budget_mb": ceil_mb(self.min_budget),
            "predicted_peak_mb": to_mb(self.predicted_peak),
            "bp_predicted_peak_mb": to_mb(bp_peak),
            "host_mb": to_mb(self.host_bytes),
            "disk_mb": to_mb(self.disk_bytes),
            "written_mb": to_mb(self.written_bytes),
            "ranges": self.cut.ranges,
            "cached": None if self.cut.cached is None else sorted(self.cut.cached),
            "seconds": None if times is None else round(times.seconds, 1),
            "cells": [_as_dict(cell, time) for cell, time in zip(self.visits, each, strict=True)],
        }


def one_if_equal(sizes: list[int]) -> int | list[int]:
    """A single number where all are the same."""
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _as_dict(cell: CellPlan, time: VisitTime | None) -> dict[str, Any]:
    values = asdict(cell)
    return {
        "name": values["name"],
        "params": values["params"],
        "predicted_peak_mb": to_mb(cell.peak),
        "micro_batch": values["micro_batch"],
        "tiles": values["tiles"],
        "latents_mb": to_mb(cell.latents),
        "seconds": None if time is None else round(time.seconds, 1),
        "bound": None if time is None else time.bound,
    }
