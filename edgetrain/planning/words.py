"""A plan's choices, and why, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from edgetrain.planning.plan import Plan, RunTimes
from edgetrain.units import ceil_mb, show_mb, show_seconds


def plan_in_words(plan: Plan, bp_peak: int | None, times: RunTimes | None) -> Iterator[str]:
    """All that a plan says; times are ``None`` where the machine's rates are unknown.

    It finds the smallest budget that works, which takes longer than the plan.
    """
    yield from choices_in_words(plan)
    smallest = f"the smallest budget that works is {ceil_mb(plan.min_budget):.2f} MiB"
    if plan.budget is None:
        yield f"Peak {show_mb(plan.predicted_peak)}{plan.beside}; {smallest}."
    elif plan.fits:
        yield f"It fits: {show_mb(plan.predicted_peak)}{plan.beside} of {show_mb(plan.stated_budget)}; {smallest}."
    else:
        yield f"It does not fit into {show_mb(plan.stated_budget)}; {smallest}."
    yield f"Backpropagation on the same net and batch: {show_mb(bp_peak)}.{_advice(plan, bp_peak)}"
    yield (
        f"Host {show_mb(plan.host_bytes)}{'' if plan.host_fits else ' (over --max-host-mb)'};"
        f" disk {show_mb(plan.disk_bytes)}{'' if plan.disk_fits else ' (over --max-disk-gb)'};"
        f" writes {show_mb(plan.written_bytes)} in all."
    )
    if times is None:
        yield "Time: unknown until `edgetrain doctor` has measured this machine once."
    else:
        yield f"Time: about {show_seconds(times.seconds)}, by what `edgetrain doctor` measured on {times.measured}."


def _advice(plan: Plan, bp_peak: int | None) -> str:
    if bp_peak is None or plan.budget is None or bp_peak > plan.budget:
        return ""
    return " It fits the budget too, and is the better choice where it does: --method bp."


def choices_in_words(plan: Plan) -> Iterator[str]:
    """The placement, micro-batches and tiles, and which latents are kept."""
    if plan.placement == "resident":
        yield "Everything stays on the device: data set, latents and all cells."
    else:
        yield "Cells stream one at a time; the data set and latents stream from disk in batches."
    yield from _pieces_in_words(plan)
    yield from _cut_in_words(plan)
    yield from plan.remarks


def counted(cells: int) -> str:
    """``1 cell``, ``2 cells``."""
    return "1 cell" if cells == 1 else f"{cells} cells"


def _pieces_in_words(plan: Plan) -> Iterator[str]:
    """How batches are cut, and cells."""
    smaller = [cell for cell in plan.visits if cell.micro_batch < plan.batch_size]
    tiled = [cell for cell in plan.cells if cell.tiles > 1]
    if smaller:
        least = min(smaller, key=lambda cell: cell.micro_batch)
        yield (
            f"Batches of {plan.batch_size} are taken in parts by {len(smaller)} of {len(plan.visits)} visits,"
            f" {least.name!r} in parts of {least.micro_batch}: the result is the same up to rounding."
        )
    if tiled:
        most = max(tiled, key=lambda cell: cell.tiles)
        yield (
            f"Waiting on the host and coming in tiles: {len(tiled)} of {counted(len(plan.cells))}, {most.name!r} in"
            f" {most.tiles}, each twice a step."
        )


def _cut_in_words(plan: Plan) -> Iterator[str]:
    cut = plan.cut
    if cut.cached is None and cut.ranges > 1:
        yield (
            f"The disk does not hold an epoch's latents: visits are cut to 1/{cut.ranges} of an epoch, and cells"
            " come and go as often."
        )
    elif cut.cached is not None:
        whole = ", ".join(str(index) for index in sorted(cut.cached) if index)
        kept = f"those of cell {whole} are cached whole; the others" if whole else "they"
        yield (
            f"The disk does not hold all latents: {kept} are emitted again when they are needed, in {cut.ranges}"
            " ranges of an epoch."
        )
