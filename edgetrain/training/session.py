"""A session: one process's work on a run, from its newest checkpoint to its end.

It prepares the data, trains, retries if memory runs out, evaluates, and writes the results.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from msgspec import structs, to_builtins

from edgetrain.data.prepare import Prepared
from edgetrain.errors import (
    BudgetError,
    DamagedLatentsError,
)
from edgetrain.memory import device as devices
from edgetrain.memory import facts
from edgetrain.memory.energy import EnergyMeter
from edgetrain.memory.host import PeakRss
from edgetrain.memory.meter import Meter, meter_of
from edgetrain.planning import timelines
from edgetrain.planning.plan import Plan, one_if_equal
from edgetrain.planning.planner import backprop_peak
from edgetrain.planning.words import choices_in_words
from edgetrain.record import MemorySeries, RunRecord
from edgetrain.store.entries import FORMAT
from edgetrain.store.run import RunFolder
from edgetrain.stream.latents import FileLatents
from edgetrain.training.callbacks import Callback
from edgetrain.training.checkpointing import Digests, working_files
from edgetrain.training.config_file import config_text, settings_of
from edgetrain.training.inputs import digest, pack
from edgetrain.training.job import Job, host_tier, plan_job
from edgetrain.training.predictor import Predictions
from edgetrain.training.prepared import Inputs
from edgetrain.training.run import predictor_of
from edgetrain.training.stopping import Stop
from edgetrain.training.trainer import Choices, Trainer
from edgetrain.units import show_mb, to_mb


def train_and_finish(job: Job, plan: Plan, folder: RunFolder, callback: Callback, inputs: Inputs | None = None) -> None:
    """Train a planned run from its newest checkpoint (or from the start), evaluate and finish it; the folder is locked.

    ``inputs`` are prepared here unless they are given.
    """
    device = job.work.device
    if folder.restore_config():
        callback.note(f"{folder.path / 'config.toml'}: was not as it was written; it was made again from the journal")
    with PeakRss() as host, EnergyMeter(device) as energy, ExitStack() as opened:
        predicted = _Predictions.of(job, plan)
        stop = Stop(callback.note, job.settings.time_limit)  # the clock of time and energy starts here
        energy.restart()
        folder.clear_working_files(working_files(folder.last()) | (inputs.names if inputs else set()))
        meter = meter_of(device, job.settings.meter == "full")
        around = _Surroundings(folder, meter, callback, stop, energy, opened)
        devices.check_allocator(device)
        with devices.running_on(device, plan.budget):
            plan, record, trainer, used = _train_or_retry(job, plan, around, inputs)
            _evaluate(job, folder, plan, used, meter, record, trainer)
        record.energy_source = energy.source
        _complete(folder, record, trainer, host, job, plan, predicted)
    callback.finished(record)


@dataclass(frozen=True)
class _Surroundings:
    """What a run's training has to do with, besides the job and its plan; ``opened`` closes what is opened."""

    folder: RunFolder
    meter: Meter
    callback: Callback
    stop: Stop
    energy: EnergyMeter
    opened: ExitStack


def _train_or_retry(
    job: Job, plan: Plan, around: _Surroundings, inputs: Inputs | None
) -> tuple[Plan, RunRecord, Trainer, Inputs]:
    """Train; if memory runs out or latents are damaged, say so and retry once from the newest checkpoint.

    Raises:
        BudgetError: memory ran out, and there is nothing smaller to try.
        DamagedLatentsError: latents are damaged again, or belong to the newest checkpoint.
    """
    for retried in (False, True):
        around.folder.measure()
        record = _record(job, plan, around.folder)
        around.callback.planned(plan, record)
        try:
            return plan, record, *_train(job, plan, around, None if retried else inputs)
        except DamagedLatentsError as error:
            if retried:
                raise
            around.callback.note(f"{error}; resuming from the newest checkpoint, with new latents")
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            smaller = None if retried else _smaller(job, plan)
            said = (
                f"out of memory although the predicted peak was {show_mb(plan.predicted_peak)}"
                f" ({_budget_in_words(plan)}): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
            if smaller is None:
                raise BudgetError(f"{said}; use a smaller --max-gpu-mb, --batch-size or --micro-batch") from error
            around.callback.note(
                f"{said}; trying once more, with micro-batches of {one_if_equal(smaller.micro_batches)}"
            )
            plan = smaller
            around.folder.configure(config_text(job.settings, plan.decisions))
        around.folder.clear_working_files(working_files(around.folder.last()))
        around.stop.began = time.monotonic()  # the newest checkpoint knows the time until then, and the energy
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
    decided = structs.replace(plan.decisions, micro_batch=one_if_equal(sizes))
    return plan_job(replace(job, decided=decided), plan.budget)  # what is free now is less by what the run holds


def _budget_in_words(plan: Plan) -> str:
    return "no budget" if plan.budget is None else f"budget {show_mb(plan.stated_budget)}"


def _train(job: Job, plan: Plan, around: _Surroundings, inputs: Inputs | None) -> tuple[Trainer, Inputs]:
    folder = around.folder
    inputs = inputs or Inputs.prepared(job, folder)
    train = inputs.train
    for part in inputs.parts:
        around.opened.callback(part.close)
        folder.usage.stored(part.written)
    assert train.y is not None
    digests = Digests(digest(train), None if inputs.test is None else digest(inputs.test))
    digests.check(folder, job.data.name)
    _keep_path(job, folder, plan)
    choices = Choices(
        host_tier(job, plan), job.settings.prefetch, job.settings.keep_latents, job.settings.checkpoint_every
    )
    rows = FileLatents.of_files({"x": train.x}, around.meter.host)
    trainer = Trainer(
        job.work, plan, folder, rows, train.y, pack(inputs.statistics), digests, around.meter, around.callback, choices,
        around.stop, lambda: around.energy.joules, _evaluated_rows(job, inputs),
    )  # fmt: skip
    with around.stop.listening():
        trainer.run()
    return trainer, inputs


def _evaluated_rows(job: Job, inputs: Inputs) -> Prepared | None:
    """The rows with which training is evaluated, if it is."""
    return None if job.work.evaluate_every is None else inputs.validation or inputs.test


def _keep_path(job: Job, folder: RunFolder, plan: Plan) -> None:
    """Let the run know its data by the path they were last given by."""
    kept = settings_of(folder.path)
    if kept.data != job.settings.data:
        folder.configure(config_text(replace(kept, data=job.settings.data), plan.decisions))


def _evaluate(
    job: Job,
    folder: RunFolder,
    plan: Plan,
    inputs: Inputs,
    meter: Meter,
    record: RunRecord,
    trainer: Trainer,
) -> None:
    cells, pieces = trainer.records[: job.work.depth], (
        plan.micro_batches, plan.tiles, [cell.evaluation_seed for cell in plan.cells],
    )  # fmt: skip

    def evaluated(rows: Prepared) -> Predictions:
        predictor = predictor_of(folder, job.work.nodes, job.work.objective, job.work.device, meter, pieces)
        found = predictor.run(FileLatents.of_files({"x": rows.x}, meter.host), rows.y, whole=True)
        for cell, peak in zip(cells, found.peaks, strict=True):
            cell.peak_gpu_mb = max(cell.peak_gpu_mb or 0.0, to_mb(peak) or 0.0)
        return found

    own: str = job.work.objective.vote
    record.vote = own
    if job.work.evaluate_every is not None:
        record.evaluated = "test" if inputs.validation is None else "validation"
    if inputs.validation is not None:
        record.validation_votes = dict(evaluated(inputs.validation).accuracy)
        if job.settings.vote == "auto":  # of equal ones the method's own
            record.vote = max(record.validation_votes, key=lambda vote: (record.validation_votes[vote], vote == own))
    if inputs.test is not None:
        found = evaluated(inputs.test)
        record.votes = {**found.accuracy, "cells": found.cells}
        record.test_accuracy = found.accuracy.get(record.vote)
        for cell, accuracy in zip(cells, found.cells, strict=True):
            cell.test_accuracy = accuracy
    record.cells = cells
    record.classifier = trainer.records[-1] if job.work.classifier else None
    if record.classifier is not None:
        record.classifier.test_accuracy = record.votes.get("classifier")


@dataclass(frozen=True)
class _Predictions:
    """What dry runs tell of a run and of backpropagation on the same net, for its record."""

    plan: Plan
    memory: list[MemorySeries]
    bp_memory: MemorySeries | None = None
    bp_peak: int | None = None

    @classmethod
    def of(cls, job: Job, plan: Plan) -> _Predictions:
        memory = timelines.of_run(job.work, plan)
        if job.settings.schedule is None:  # a baseline
            return cls(plan, memory)
        whole = timelines.of_backpropagation(job.work, job.net)
        return cls(plan, memory, whole, backprop_peak(job.work, job.net))


def _complete(
    folder: RunFolder, record: RunRecord, trainer: Trainer, host: PeakRss, job: Job, plan: Plan, predicted: _Predictions
) -> None:
    trainer.checkpoints.finish()
    record.waited_seconds = round(sum(cell.waited_seconds for cell in trainer.records), 3)
    peaks = [cell.peak_gpu_mb for cell in trainer.records if cell.peak_gpu_mb is not None]
    record.peak_gpu_mb = max(peaks) if peaks else None
    record.context_mb = to_mb(devices.context_bytes(job.work.device))
    record.peak_host_mb = to_mb(host.peak_bytes)
    record.latents_mb = to_mb(trainer.latents_peak)
    record.memory = predicted.memory if predicted.plan is plan else timelines.of_run(job.work, plan)
    record.bp_memory, record.bp_predicted_peak_mb = predicted.bp_memory, to_mb(predicted.bp_peak)

    def measured() -> dict[str, Any]:
        record.disk_mb = to_mb(folder.usage.peak)
        totals = trainer.checkpoints.totals()
        record.seconds, record.checkpoint_seconds = totals.seconds, totals.checkpoint_seconds
        record.written_mb, record.energy_j = to_mb(totals.written), totals.energy
        return {**record.as_dict(), "data": asdict(job.shape)}

    settings = asdict(replace(job.settings, time_limit=None))
    about = {"format": FORMAT, "settings": settings, "plan": to_builtins(plan.decisions), "data": asdict(job.shape)}
    folder.write_results(about, measured)
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
        edits=[edit.words for edit in folder.journal.history().edits],
    )
