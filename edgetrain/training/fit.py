"""One run from beginning to end: plan, prepare, train, evaluate, finish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgetrain.config import Settings
from edgetrain.data.base import DataSet
from edgetrain.data.prepare import Prepared
from edgetrain.data.specs import absolute, open_data
from edgetrain.errors import (
    BudgetError,
    CorruptError,
    DamagedLatentsError,
    DivergedError,
    InputError,
    StorageError,
)
from edgetrain.memory import device as devices
from edgetrain.memory import facts
from edgetrain.memory.energy import EnergyMeter
from edgetrain.memory.host import PeakRss
from edgetrain.memory.meter import Meter, meter_of
from edgetrain.planning import timelines
from edgetrain.planning.plan import Plan
from edgetrain.planning.planner import backprop_peak, require_fit
from edgetrain.planning.words import choices_in_words
from edgetrain.plugins import is_own
from edgetrain.record import MemorySeries, RunRecord
from edgetrain.store.atomic import missing_folders, size_of
from edgetrain.store.edit import is_pending, open_folder
from edgetrain.store.journal import FORMAT
from edgetrain.store.run import RunFolder
from edgetrain.stream.latents import FileLatents
from edgetrain.training.commits import ROWS, check_rows, working_files
from edgetrain.training.finished import Run, digests_of, predictor_of, settings_of
from edgetrain.training.identity import check_net, fingerprints
from edgetrain.training.inputs import digest, pack
from edgetrain.training.job import Job, host_tier, open_job, plan_job, stated_reading
from edgetrain.training.methods import CLASS, check_method, fingerprint
from edgetrain.training.prepared import Inputs
from edgetrain.training.process import process_state
from edgetrain.training.resuming import resuming_command
from edgetrain.training.stopping import Stop
from edgetrain.training.trainer import Choices, Trainer
from edgetrain.training.watcher import Silent, Watcher
from edgetrain.units import show_mb, to_mb


def fit(
    settings: Settings,
    path: Path,
    net: Any = None,
    data: DataSet | None = None,
    resume: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
    method: Any = None,
) -> Run:
    """Train as ``settings`` say, in the run folder ``path``.

    Args:
        settings: see ``config.Settings``.
        path: the run folder.
        net: modules or a function instead of ``settings.net``.
        data: a data set instead of ``settings.data``.
        resume: go on from the folder's newest commit; a finished run is returned as it is.
        force: remove the folder's run first.
        watcher: is told of progress.
        method: a class instead of ``settings.method``.

    Raises:
        InputError: settings, data or folder are not as they must be.
        BudgetError: the budget cannot hold the run.
        StorageError: the disk refused.
        CorruptError: a file of the run is damaged, and cannot be made again.
        BusyError: another process works in the folder.
        DivergedError: a loss is not finite.
        Stopped: by a signal or the time limit; what was done is committed.
    """
    folder, watcher = open_folder(path), watcher or Silent()
    if _check_folder(folder, resume, force) and folder.is_finished():
        return _as_it_is(folder, settings, (net, method), data, watcher)
    with process_state(settings):
        job = open_job(settings, net, data, method)
        plan = plan_job(job)
        require_fit(plan)
        check_disk(path, plan)
        with working_in(folder):
            resuming = _check_folder(folder, resume, force)  # another process may have been here meanwhile
            if resuming and folder.is_finished():
                return _as_it_is(folder, settings, (net, method), data, watcher)
            inputs = None
            if resuming:
                check_net(folder, job.work.nodes, training=True)
                check_method(folder, type(job.work.objective))
            else:
                if folder.is_run():  # bad data must not cost the run that is there
                    inputs = Inputs.prepared(job, folder, "new-")
                folder.clear(keep=() if inputs is None else inputs.names)
                config, net_made = as_planned(job, plan).to_toml(), fingerprints(job.work.nodes)
                folder.create(config, net_made, requested(job.settings), described(job))
            try:
                carry_out(job, plan, folder, watcher, inputs)
            except BaseException as error:
                if folder.last() is None:
                    folder.clear()
                    watcher.note("nothing was committed yet, so the run was removed")
                elif not isinstance(error, (CorruptError, DivergedError, InputError)):  # these would come again
                    watcher.note(f"what was committed is kept; go on with: {resuming_command(path, job.settings)}")
                raise
            return Run.of_job(path, job)


def _as_it_is(
    folder: RunFolder, settings: Settings, own: tuple[Any, Any], data: DataSet | None, watcher: Watcher
) -> Run:
    """The finished run; ``own`` are the net and the method that were given in Python.

    Raises:
        InputError: the data that are given again are not its own.
    """
    net, method = own  # or the caller named a file of its own
    net = settings.net if net is None and is_own(settings.net) else net
    method = settings.method if method is None and is_own(settings.method) else method
    run = Run.open(folder.path, net, method)
    if data is None and absolute(settings.data) != run.settings.data:
        given = open_data(settings.data, stated_reading(settings))
        check_rows(folder, given.name, digests_of(folder, given))
    watcher.note(f"{folder.path}: this run is finished")
    if is_pending(folder):
        watcher.note(f"{folder.path}: an unfinished edit is kept; repeat the cells command to continue it")
    return run


def _check_folder(folder: RunFolder, resume: bool, force: bool) -> bool:
    """Whether a run is resumed.

    Raises:
        InputError: the folder is taken.
    """
    if resume and force:
        raise InputError("--resume and --force exclude each other: one keeps the run, the other removes it")
    if folder.path.is_file():
        raise InputError(f"{folder.path}: is a file; expected a folder for the run")
    if folder.is_free():
        return False
    if resume:
        if not folder.is_run():
            raise InputError(f"{folder.path}: holds no edgetrain run to resume")
        folder.journal.check_format()
        return folder.last() is not None
    if not force:
        kind = "a run" if folder.is_run() else "files that are no run of edgetrain"
        hint = "use --resume to go on with it, --force to replace it, or" if folder.is_run() else ""
        raise InputError(f"{folder.path}: exists and holds {kind}; {hint} choose another --run-dir".replace("  ", " "))
    if not folder.is_run():
        raise InputError(f"{folder.path}: holds no edgetrain run, so --force does not remove it")
    return False


def check_disk(path: Path, plan: Plan, replaces: bool = True) -> None:
    """Refuse a run that needs more than the free disk space; ``replaces``: what is in ``path`` counts as free."""
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free + (size_of(path) if replaces else 0)
    if plan.disk_bytes > free:
        raise StorageError(
            f"{existing}: has {show_mb(free)} free, the run needs {show_mb(plan.disk_bytes)}; make room, choose"
            " another --run-dir, use --latent-dtype uint8, or state --max-disk-gb: latents are then emitted again"
        )


@contextmanager
def working_in(folder: RunFolder) -> Iterator[None]:
    """A scope in which the folder is this process's; if no run was begun there it is as before."""
    created = missing_folders(folder.path)
    with folder.locked():
        try:
            yield
        finally:
            folder.remove_if_free(created)


def carry_out(job: Job, plan: Plan, folder: RunFolder, watcher: Watcher, inputs: Inputs | None = None) -> None:
    """Train a planned run from its newest commit (or from the start), evaluate and finish it; the folder is locked.

    ``inputs`` are prepared here unless they are given.
    """
    device = job.work.device
    if folder.restore_config():
        watcher.note(f"{folder.path / 'config.toml'}: was not as it was written; it was made again from the journal")
    with PeakRss() as host, EnergyMeter(device) as energy, ExitStack() as opened:
        foreseen = _Foreseen.of(job, plan)
        stop = Stop(watcher.note, job.settings.time_limit)  # the clock of time and energy starts here
        energy.restart()
        folder.clear_working_files(working_files(folder.last()) | (inputs.names if inputs else set()))
        meter = meter_of(device, job.settings.meter == "full")
        around = _Surroundings(folder, meter, watcher, stop, energy, opened)
        devices.check_allocator(device)
        with devices.running_on(device, plan.budget):
            plan, record, trainer, test = _train_or_retry(job, plan, around, inputs)
            _evaluate(job, folder, plan, test, meter, record, trainer)
        record.energy_source = energy.source
        _complete(folder, record, trainer, host, job, plan, foreseen)
    watcher.finished(record)


@dataclass(frozen=True)
class _Surroundings:
    """What a run's training has to do with, besides the job and its plan; ``opened`` closes what is opened."""

    folder: RunFolder
    meter: Meter
    watcher: Watcher
    stop: Stop
    energy: EnergyMeter
    opened: ExitStack


def _train_or_retry(
    job: Job, plan: Plan, around: _Surroundings, inputs: Inputs | None
) -> tuple[Plan, RunRecord, Trainer, Prepared | None]:
    """Train; if memory runs out all the same, or latents are damaged, say so and go on once from the newest commit.

    Raises:
        BudgetError: memory ran out, and there is nothing smaller to try.
        DamagedLatentsError: latents are damaged again, or belong to the newest commit.
    """
    for retried in (False, True):
        around.folder.measure()
        record = _record(job, plan, around.folder)
        around.watcher.planned(plan, record)
        try:
            return plan, record, *_train(job, plan, around, None if retried else inputs)
        except DamagedLatentsError as error:
            if retried:
                raise
            around.watcher.note(f"{error}; going on from the newest commit, with latents made anew")
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            smaller = None if retried else _smaller(job, plan)
            said = (
                f"memory ran out, though the plan foresees a peak of {show_mb(plan.predicted_peak)}"
                f" ({_budget_in_words(plan)}): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
            if smaller is None:
                raise BudgetError(f"{said}; state a smaller --max-gpu-mb, --batch-size or --micro-batch") from error
            around.watcher.note(f"{said}; trying once more, with micro-batches of {_compact(smaller.micro_batches)}")
            plan = smaller
            around.folder.reconfigure(as_planned(job, plan).to_toml())
        around.folder.clear_working_files(working_files(around.folder.last()))
        around.stop.began = time.monotonic()  # the newest commit knows the time until then, and the energy
        around.energy.restart()
    raise AssertionError("the second try returns or raises")


def _smaller(job: Job, plan: Plan) -> Plan | None:
    """The plan with micro-batches of half the size, where batches may be split and are not single samples."""
    sizes = [
        size if index < job.work.depth and job.work.couples_batch(index) else -(-size // 2)
        for index, size in enumerate(plan.micro_batches)
    ]
    if sizes == plan.micro_batches:
        return None
    settings = replace(as_planned(job, plan), micro_batch=sizes)
    return plan_job(replace(job, settings=settings), plan.budget)  # what is free now is less by what the run holds


def as_planned(job: Job, plan: Plan) -> Settings:
    """The settings with the plan's choices, so that a resumed run makes the same."""
    return replace(
        job.settings,
        micro_batch=_compact(plan.micro_batches),
        tiles=_compact(plan.tiles),
        placement=_placement(job, plan),
        ranges=plan.cut.ranges,
        cached=None if plan.cut.cached is None else sorted(plan.cut.cached),
        time_limit=None,
    )


def described(job: Job) -> dict[str, str]:
    """What the journal knows the method by, if it is the user's own."""
    own = is_own(job.settings.method) or job.settings.method == CLASS
    return fingerprint(type(job.work.objective)) if own else {}


def requested(settings: Settings) -> dict[str, Any]:
    """The settings that ``as_planned`` replaces, as they were asked for."""
    return {name: getattr(settings, name) for name in ("micro_batch", "tiles", "placement")}


def _budget_in_words(plan: Plan) -> str:
    return "no budget" if plan.budget is None else f"budget {show_mb(plan.stated_budget)}"


def _train(job: Job, plan: Plan, around: _Surroundings, inputs: Inputs | None) -> tuple[Trainer, Prepared | None]:
    folder = around.folder
    inputs = inputs or Inputs.prepared(job, folder)
    train = inputs.train
    for part in inputs.parts:
        around.opened.callback(part.close)
        folder.space(part.written)
        folder.wrote(part.written)
    assert train.y is not None
    digests = {"data": digest(train), "test": None if inputs.test is None else digest(inputs.test)}
    check_rows(folder, job.data.name, digests)
    _keep_path(job, folder)
    choices = Choices(
        host_tier(job, plan), job.settings.prefetch, job.settings.keep_latents, job.settings.checkpoint_every
    )
    rows = FileLatents.of_files({"x": train.x}, around.meter.host)
    trainer = Trainer(
        job.work, plan, folder, rows, train.y, pack(inputs.scaling), digests, around.meter, around.watcher, choices,
        around.stop, lambda: around.energy.joules,
    )  # fmt: skip
    with around.stop.listening():
        trainer.run()
    return trainer, inputs.test


def _keep_path(job: Job, folder: RunFolder) -> None:
    """Let the run know its data by the path they were last given by."""
    kept = settings_of(folder.path)
    if kept.data != job.settings.data:
        folder.reconfigure(replace(kept, data=job.settings.data).to_toml())


def _evaluate(
    job: Job,
    folder: RunFolder,
    plan: Plan,
    test: Prepared | None,
    meter: Meter,
    record: RunRecord,
    trainer: Trainer,
) -> None:
    cells = trainer.records[: job.work.depth]
    if test is not None:
        pieces = plan.micro_batches, plan.tiles, [cell.evaluation_seed for cell in plan.cells]
        predictor = predictor_of(folder, job.work.nodes, job.work.objective, job.work.device, meter, pieces)
        found = predictor.run(FileLatents.of_files({"x": test.x}, meter.host), test.y, whole=True)
        record.votes = {**found.accuracy, "cells": found.cells}
        record.test_accuracy = found.accuracy.get(job.work.objective.vote)
        for cell, accuracy, peak in zip(cells, found.cells, found.peaks, strict=True):
            cell.test_accuracy = accuracy
            cell.peak_gpu_mb = max(cell.peak_gpu_mb or 0.0, to_mb(peak) or 0.0)
    record.cells = cells
    record.readout = trainer.records[-1] if job.work.classifier else None
    if record.readout is not None:
        record.readout.test_accuracy = record.test_accuracy


@dataclass(frozen=True)
class _Foreseen:
    """What dry runs tell of a run and of backpropagation on the same net, for its record."""

    plan: Plan
    memory: list[MemorySeries]
    bp_memory: MemorySeries | None = None
    bp_peak: int | None = None

    @classmethod
    def of(cls, job: Job, plan: Plan) -> _Foreseen:
        memory = timelines.of_run(job.work, plan)
        if job.settings.schedule is None:  # a baseline
            return cls(plan, memory)
        net = job.net.cells, job.net.options
        return cls(plan, memory, timelines.of_backpropagation(job.work, *net), backprop_peak(job.work, *net))


def _complete(
    folder: RunFolder, record: RunRecord, trainer: Trainer, host: PeakRss, job: Job, plan: Plan, foreseen: _Foreseen
) -> None:
    last = folder.last()
    assert last is not None
    if not last.get("finished"):
        kept = ("visits", "cells", *ROWS, "seconds", "commit_seconds", "written", "energy")
        folder.finish(folder.commits() + 1, {name: value for name, value in last.items() if name in kept})
    record.waited_seconds = round(sum(cell.waited_seconds for cell in trainer.records), 3)
    peaks = [cell.peak_gpu_mb for cell in trainer.records if cell.peak_gpu_mb is not None]
    record.peak_gpu_mb = max(peaks) if peaks else None
    record.context_mb = to_mb(devices.context_bytes(job.work.device))
    record.peak_host_mb = to_mb(host.peak_bytes)
    record.latents_mb = to_mb(trainer.latents_peak)
    record.memory = foreseen.memory if foreseen.plan is plan else timelines.of_run(job.work, plan)
    record.bp_memory, record.bp_predicted_peak_mb = foreseen.bp_memory, to_mb(foreseen.bp_peak)

    def measured() -> dict[str, Any]:
        record.disk_mb = to_mb(folder.peak_space)
        totals = trainer.commits.totals()
        record.seconds, record.commit_seconds = totals["seconds"], totals["commit_seconds"]
        record.written_mb, record.energy_j = to_mb(int(totals["written"])), totals["energy"]
        return {**record.as_dict(), "data": asdict(job.shape)}

    folder.write_results(
        {"format": FORMAT, "settings": asdict(as_planned(job, plan)), "data": asdict(job.shape)}, measured
    )
    if not job.settings.keep_latents:
        folder.clear_working_files()


def _record(job: Job, plan: Plan, folder: RunFolder) -> RunRecord:
    return RunRecord(
        run=str(folder.home.absolute()),
        method=job.work.objective.name,
        schedule=job.settings.schedule,
        device=facts.name(job.work.device),
        seed=job.settings.seed,
        rows=job.work.rows,
        input=job.input,
        epochs=job.work.epochs,
        budget_mb=to_mb(plan.stated_budget),
        predicted_peak_mb=to_mb(plan.predicted_peak),
        placement=plan.placement,
        citations=[job.work.objective.citation],
        plan=list(choices_in_words(plan)),
        edits=[entry["edit"] for entry in folder.journal.entries() if "edit" in entry],
    )


def _compact(sizes: list[int]) -> int | list[int]:
    """One number where all are the same."""
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _placement(job: Job, plan: Plan) -> Any:
    """What ``auto`` came out as on a GPU is kept, so that a resumed run is placed the same."""
    return plan.placement if plan.placement == "resident" else job.settings.placement
