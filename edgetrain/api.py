"""The Python API: the commands as functions, for modules and arrays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetrain.config import resolve
from edgetrain.data.arrays import ARRAYS, from_arrays
from edgetrain.data.base import DataSet
from edgetrain.data.layout import AS_FOUND, Reading
from edgetrain.errors import InputError
from edgetrain.objectives.base import Objective
from edgetrain.plugins import is_own
from edgetrain.report.page import write_report
from edgetrain.report.tensorboard import logged
from edgetrain.training import edits
from edgetrain.training.callbacks import Callback
from edgetrain.training.fit import fit as _fit
from edgetrain.training.job import stated_reading
from edgetrain.training.methods import CLASS
from edgetrain.training.resuming import resumed_settings, run_folder
from edgetrain.training.run import Run

__all__ = ["Run", "append_cells", "drop_cells", "fit", "open_run", "report_runs", "retrain_cells"]


def fit(
    net: Any,
    data: Any,
    method: str | type[Objective] = "mf",
    *,
    run_dir: str | Path | None = None,
    profile: str | None = None,
    resume: bool = False,
    force: bool = False,
    callback: Callback | None = None,
    tensorboard: bool = False,
    **settings: Any,
) -> Run:
    """Train a network one cell at a time.

    Args:
        net: a specification such as ``"mlp:1000x2"``, a list of modules, an ``nn.Sequential``, or a function that
            returns or yields modules. Modules are copied, never modified.
        data: a data set such as ``"mnist"``, arrays ``(X, y)``, or ``((X, y), (X_test, y_test))``. X has shape
            [rows, features] for tables, and [rows, H, W], [rows, H, W, C] or [rows, C, H, W] for images (uint8
            pixels or floating point); pass ``input`` and ``channels`` for other layouts. y has shape [rows], with
            integers from 0 to classes - 1.
        method: a local rule or a baseline: its name, ``"path/to/my_rule.py:MyRule"``, or a subclass of
            ``edgetrain.objectives.base.Objective``.
        run_dir: the run folder. Default: a new folder under ``runs/``.
        profile: name or path of a profile with settings; ``**settings`` take precedence.
        resume: resume the run in ``run_dir``, or start it if the folder is missing or empty. Needs ``run_dir``.
        force: replace the run in ``run_dir``.
        callback: called with progress, notes and warnings.
        tensorboard: write TensorBoard event files to the run folder.
        **settings: any field of ``edgetrain.config.Settings``, such as ``max_gpu_mb=512`` (MiB).

    Returns:
        The finished run.

    Raises:
        EdgetrainError: see ``edgetrain.errors``. No partial files are left.
        Stopped: by a signal or by ``time_limit``, after saving a checkpoint; ``resume=True`` continues from it.
    """
    if resume and run_dir is None:
        raise InputError("resume=True needs run_dir, the folder of the run to resume")
    own = None if isinstance(method, str) else method
    given = {"method": method if isinstance(method, str) else CLASS, **settings}
    modules = None
    if isinstance(net, str):
        given["net"] = net
    else:
        given["net"], modules = "modules", net
    given["data"] = data if isinstance(data, str) else data.name if isinstance(data, DataSet) else ARRAYS
    resolved = resolve(given, profile)
    named = resolved.method if own is None else own.__name__
    path = None if run_dir is None else Path(run_dir).expanduser()
    if resume and path is not None:
        resolved = resumed_settings(path, given, resolved, may_start=True)
    reading = stated_reading(resolved)
    if isinstance(data, DataSet) and reading != AS_FOUND:
        raise InputError(
            f"data {data.name!r}: --input and --channels are for arrays and files; a DataSet is read already"
        )
    opened = _data_set(data, reading)
    with logged(callback or Callback(), tensorboard) as callback, run_folder(path, resolved.data, named) as folder:
        return _fit(resolved, folder, modules, opened, resume, force, callback, own)


def open_run(path: str | Path, net: Any = None, method: Any = None) -> Run:
    """Open a finished run.

    Args:
        path: the run folder.
        net: the net again, for a run of your own modules.
        method: the method again, for a run of your own class.

    Raises:
        InputError: the folder holds no finished run.
    """
    return Run.open(Path(path).expanduser(), net, method)


def report_runs(*runs: Run | str | Path, folder: str | Path | None = None) -> Path:
    """Write an HTML report of one or more runs, and its figures as PNG files.

    Args:
        *runs: runs or run folders.
        folder: where to write ``report.html`` and ``figures/``. Default: the run's own folder, or ``report/`` for
            several runs.

    Returns:
        The path of the page.

    Raises:
        InputError: matplotlib or jinja2 is not installed, or a folder holds no run.
    """
    paths = [run.path if isinstance(run, Run) else Path(run) for run in runs]
    return write_report(paths, None if folder is None else Path(folder))[0]


def append_cells(run: Run, net: Any, data: Any = None, callback: Callback | None = None, **settings: Any) -> Run:
    """Train more cells on top of a finished run; its own cells stay as they are.

    Args:
        run: the finished run.
        net: a longer net that starts with the run's cells.
        data: the run's data again, if they were arrays.
        callback: called with progress, notes and warnings.
        **settings: for the new cells, such as ``epochs`` and ``lr``.

    Returns:
        The run with the new cells.

    Raises:
        InputError: the net does not begin with the run's cells, or has no more than these.
    """
    return edits.append(run.path, net, settings, _again(run, data), callback, _own_method(run))


def drop_cells(
    run: Run, number: int | None = None, net: Any = None, data: Any = None, callback: Callback | None = None
) -> Run:
    """Remove a cell of a finished run and all cells after it.

    Args:
        run: the finished run.
        number: of the cell, counted from 1. Default: the last.
        net: the net again, for a run of your own modules.
        data: the run's data again, if they were arrays.
        callback: called with progress, notes and warnings.

    Returns:
        The shorter run.

    Raises:
        InputError: the run has no such cell, or it is the first.
    """
    return edits.drop(run.path, number, net, _again(run, data), callback, _own_method(run))


def retrain_cells(
    run: Run, number: int, net: Any = None, data: Any = None, callback: Callback | None = None, **settings: Any
) -> Run:
    """Train a cell of a finished run again, and all cells after it.

    Args:
        run: the finished run.
        number: of the cell, counted from 1.
        net: the net again, for a run of your own modules.
        data: the run's data again, if they were arrays.
        callback: called with progress, notes and warnings.
        **settings: for the cells that are trained, such as ``epochs`` and ``lr``.

    Returns:
        The changed run.

    Raises:
        InputError: the run has no such cell.
    """
    return edits.retrain(run.path, number, net, settings, _again(run, data), callback, _own_method(run))


def _own_method(run: Run) -> type[Objective] | None:
    """The run's method, if it is the user's own class."""
    own = run.settings.method == CLASS or is_own(run.settings.method)
    return type(run.objective) if own else None


def _again(run: Run, data: Any) -> DataSet | None:
    return None if data is None else _data_set(data, run.shape.reading)


def _data_set(data: Any, reading: Reading) -> DataSet | None:
    """In-memory data as a data set; ``None`` for a spec."""
    if isinstance(data, str):
        return None
    if isinstance(data, DataSet):
        return data
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], tuple):
        return from_arrays(*data, reading=reading)
    return from_arrays(data, reading=reading)
