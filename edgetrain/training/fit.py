"""Starts or resumes a run: checks what is asked, plans, and trains in the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetrain.config import Settings
from edgetrain.data.base import DataSet
from edgetrain.data.specs import absolute
from edgetrain.errors import (
    BusyError,
    CorruptError,
    DivergedError,
    InputError,
    StorageError,
)
from edgetrain.planning.plan import Plan
from edgetrain.planning.planner import require_fit
from edgetrain.plugins import is_own
from edgetrain.store.atomic import missing_folders, size_of
from edgetrain.store.edit import is_pending, open_folder
from edgetrain.store.entries import FORMAT, Begin, Files
from edgetrain.store.run import RunFolder
from edgetrain.training.callbacks import Callback
from edgetrain.training.config_file import config_text, decisions_of
from edgetrain.training.identity import check_net, fingerprints
from edgetrain.training.job import Job, data_of, open_job, plan_job
from edgetrain.training.methods import CLASS, check_method, fingerprint
from edgetrain.training.prepared import Inputs
from edgetrain.training.process import process_state
from edgetrain.training.resuming import resuming_command
from edgetrain.training.run import Run, digests_of
from edgetrain.training.session import train_and_finish
from edgetrain.units import show_mb


def fit(
    settings: Settings,
    path: Path,
    net: Any = None,
    data: DataSet | None = None,
    resume: bool = False,
    force: bool = False,
    callback: Callback | None = None,
    method: Any = None,
) -> Run:
    """Train as ``settings`` say, in the run folder ``path``.

    Args:
        settings: see ``config.Settings``.
        path: the run folder.
        net: modules or a function instead of ``settings.net``.
        data: a data set instead of ``settings.data``.
        resume: resume from the folder's newest checkpoint; a finished run is returned as it is.
        force: remove the folder's run first.
        callback: receives progress and notes.
        method: a class instead of ``settings.method``.

    Raises:
        InputError: settings, data or folder are not as they must be.
        BudgetError: the budget cannot hold the run.
        StorageError: the disk refused.
        CorruptError: a file of the run is damaged, and cannot be made again.
        BusyError: another process works in the folder.
        DivergedError: a loss is not finite.
        Stopped: by a signal or the time limit; what was done is in a checkpoint.
    """
    folder, callback = open_folder(path), callback or Callback()
    resuming = check_folder(folder, resume, force)
    if resuming and folder.is_finished():
        return _as_it_is(folder, settings, (net, method), data, callback)
    with process_state(settings):
        job = open_job(settings, net, data, method)
        if resuming:
            job = replace(job, decided=decisions_of(path))
        plan = plan_job(job)
        require_fit(plan)
        check_disk(path, plan)
        with working_in(folder):
            now = check_folder(folder, resume, force)  # another process may have been here meanwhile
            if now and folder.is_finished():
                return _as_it_is(folder, settings, (net, method), data, callback)
            if now != resuming:
                raise BusyError(f"{path}: another edgetrain started a run here meanwhile; try again")
            inputs = None
            if resuming:
                check_net(folder, job.work.nodes, training=True)
                check_method(folder, type(job.work.objective))
            else:
                if folder.is_run():  # bad data must not cost the run that is there
                    inputs = Inputs.prepared(job, folder, "new-")
                folder.clear(keep=() if inputs is None else inputs.names)
                folder.create(beginning(job, plan))
                for note in job.notes:
                    callback.note(note)
            try:
                train_and_finish(job, plan, folder, callback, inputs)
            except BaseException as error:
                if folder.last() is None:
                    folder.clear()
                    callback.note("the run had no checkpoint yet, so its folder was removed")
                elif not isinstance(error, (CorruptError, DivergedError, InputError)):  # these would come again
                    callback.note(f"the newest checkpoint is kept; resume with: {resuming_command(path, job.settings)}")
                raise
            return Run.of_job(path, job)


def beginning(job: Job, plan: Plan, kept: Files | None = None) -> Begin:
    """The first journal entry of a run; ``kept``: files of the cells that an edit starts from."""
    own = is_own(job.settings.method) or job.settings.method == CLASS
    return Begin(
        format=FORMAT,
        config=config_text(job.settings, plan.decisions),
        net=fingerprints(job.work.nodes),
        method=fingerprint(type(job.work.objective)) if own else None,
        kept=kept or {},
    )


def _as_it_is(
    folder: RunFolder, settings: Settings, own: tuple[Any, Any], data: DataSet | None, callback: Callback
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
        given = data_of(replace(settings, validation=run.settings.validation))
        digests_of(folder, given).check(folder, given.name)
    if not run.settings.keep_latents and (folder.latents.exists() or folder.units.scratch.exists()):
        with suppress(BusyError), folder.locked():
            folder.clear_working_files()  # of a process that was killed when it had finished the run
    callback.note(f"{folder.path}: this run is finished")
    if is_pending(folder):
        callback.note(f"{folder.path}: an unfinished edit is kept; repeat the cells command to continue it")
    return run


def check_folder(folder: RunFolder, resume: bool, force: bool) -> bool:
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
            raise InputError(f"{folder.path}: is not an edgetrain run, so it cannot be resumed")
        return folder.last() is not None
    if not force:
        kind = "a run" if folder.is_run() else "files that are not an edgetrain run"
        hint = "use --resume to continue it, --force to replace it, or" if folder.is_run() else ""
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
