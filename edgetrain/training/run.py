"""A finished run: evaluate it, predict with it, load its modules."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgetrain.config import Settings
from edgetrain.data.arrays import ARRAYS, from_rows
from edgetrain.data.base import DataSet, Part
from edgetrain.data.layout import Reading
from edgetrain.data.prepare import Prepared, Statistics, prepare
from edgetrain.data.specs import open_data, open_rows
from edgetrain.errors import CorruptError, EdgetrainWarning, InputError
from edgetrain.memory import device as devices
from edgetrain.memory.meter import Meter, meter_of
from edgetrain.objectives.base import Node, Objective
from edgetrain.planning.dryrun import evaluation_seeds
from edgetrain.planning.plan import Decisions
from edgetrain.planning.workload import Workload
from edgetrain.plugins import is_own
from edgetrain.record import RunRecord
from edgetrain.store.atomic import check_target
from edgetrain.store.edit import open_folder
from edgetrain.store.entries import Files
from edgetrain.store.npy import writing_npy
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import ResidentCell, Setup, saved_tensors, shapes_of
from edgetrain.stream.latents import FileLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.state import CellState
from edgetrain.training.checkpointing import CLASSIFIER, INPUTS, Digests, check_test_rows
from edgetrain.training.config_file import decisions_of, settings_of
from edgetrain.training.identity import check_net
from edgetrain.training.inputs import Shape, digest, unpack
from edgetrain.training.job import (
    Job,
    budget_of,
    cells_of,
    data_of,
    net_of,
    objective_of,
    stated_reading,
    with_defaults,
)
from edgetrain.training.methods import CLASS, check_method, given_again, method_of
from edgetrain.training.model import Model
from edgetrain.training.predictor import Predictions, Predictor
from edgetrain.training.process import process_state


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run.

    Attributes:
        path: the run folder.
        record: what the run measured.
        settings: as requested, completed by the method's defaults.
        decisions: of the plan: placement, micro-batches, tiles.
        shape: shape and kind of the data.
        nodes: the cells.
        objective: the learning rule.
    """

    path: Path
    record: RunRecord
    settings: Settings
    decisions: Decisions
    shape: Shape
    nodes: tuple[Node, ...]
    objective: Objective

    def __repr__(self) -> str:
        record = self.record
        accuracy = "unknown" if record.test_accuracy is None else f"{record.test_accuracy:.4f}"
        return (
            f"Run({str(self.path)!r}: {record.method} on {self.shape.name!r}, {len(record.cells)} cells,"
            f" test accuracy {accuracy})"
        )

    def __reduce__(self) -> tuple[Callable[..., Run], tuple[Path]]:
        """Pickled as its folder, which must be there when it is unpickled.

        Raises:
            TypeError: its net or method is the user's own code.
        """
        for name, spec in (("net", self.settings.net), ("method", self.settings.method)):
            if is_own(spec) or spec in ("modules", CLASS):
                raise TypeError(
                    f"{self.path}: its {name} is your own code; pickle the path, and open the run with"
                    f" edgetrain.open_run(path, {name}=...)"
                )
        return type(self).open, (self.path,)

    @classmethod
    def open(cls, path: Path, net: Any = None, method: Any = None) -> Run:
        """The run in a folder.

        Args:
            path: the folder.
            net: the user's own modules or ``file.py:function``, for runs of such nets: code is run only
                when it is named by the caller, never because a folder names it.
            method: likewise, the user's own class or ``file.py:Class``.

        Raises:
            InputError: the folder holds no finished run, or its net must be given.
            CorruptError: its record is damaged.
        """
        record, shape = read_record(path)
        settings = settings_of(path)
        own = given_again(path, settings, method)
        method = method_of(settings, own)
        if own is not None:
            check_method(RunFolder(path), method)
        settings = with_defaults(settings, method)
        with process_state(settings):
            opened = net_of(settings, method, shape, _net(settings, net))
        objective = objective_of(settings, method, shape, opened)
        nodes = cells_of(settings, objective, shape, opened)
        check_net(RunFolder(path), nodes, training=False)
        return cls(path.absolute(), record, settings, decisions_of(path), shape, nodes, objective)

    @classmethod
    def of_job(cls, path: Path, job: Job) -> Run:
        """The run of a job that was just finished in a folder."""
        settings = with_defaults(settings_of(path), type(job.work.objective))
        work = job.work
        return cls(
            path.absolute(), read_record(path)[0], settings, decisions_of(path), job.shape, work.nodes, work.objective
        )

    @property
    def vote(self) -> str:
        """The vote by which the run predicts: the method's own, or the one that ``--vote auto`` chose."""
        return self.record.vote or self.objective.vote

    def evaluate(self, data: Any = None, device: str | None = None) -> Predictions:
        """Measure the accuracy by each vote and of each cell.

        If the run drew its test rows from ``data``, only these rows are evaluated; ``Predictions.data`` says which
        rows were used.

        Args:
            data: a data set, arrays ``(X, y)``, or ``None`` for the run's own test rows.
            device: where to run. Default: the device on which the run was trained.

        Returns:
            Scores [rows, classes], float32, by vote, and accuracies from 0 to 1.

        Raises:
            InputError: the data are not like those the run was trained on, or have no labels; or the run's own
                test rows are not what they were.
        """
        opened = self._own() if data is None else self._held_out(self._open(data))
        if opened.test is None:
            raise InputError(f"data {opened.name!r}: holds no test rows")
        with self._prepared(opened, opened.test) as rows:
            if rows.y is None:
                raise InputError(f"data {opened.name!r}: has rows without labels (-1 is unknown); use predict")
            if data is None:
                check_test_rows(RunFolder(self.path), opened.name, digest(rows))
            found = self._predict(rows, device)
            spec = self.settings.data if data is None else data
            name = Path(spec).name if isinstance(spec, str) else opened.name
            return replace(found, data=self._rows_in_words(opened, name, rows), rows=rows.x.rows)

    def predict(self, data: Any, device: str | None = None) -> NDArray[np.int64]:
        """Predict labels [rows], int64, by the method's vote.

        Args:
            data: a data set, or an array [rows, ...] of the same shape as the training rows.
            device: where to run. Default: the device on which the run was trained.

        Raises:
            InputError: the data are not like those the run was trained on.
        """
        return np.asarray(self.scores(data, device).argmax(1))

    def probabilities(self, data: Any, device: str | None = None) -> NDArray[np.float64]:
        """Predict class probabilities [rows, classes], float64: the softmax of ``scores``; see ``predict``."""
        scores = self.scores(data, device).astype(np.float64)
        shifted = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(shifted / shifted.sum(1, keepdims=True))

    def scores(self, data: Any, device: str | None = None) -> NDArray[np.float32]:
        """Predict class scores [rows, classes], float32, by the method's vote; see ``predict``."""
        opened = self._open(data)
        assert opened.test is not None
        with self._prepared(opened, opened.test) as rows:
            return self._predict(rows, device).scores[self.vote]

    def latents(self, data: Any, target: Path, device: str | None = None) -> tuple[int, ...]:
        """Write the last cell's latents as a ``.npy`` file [rows, ...], float32, streamed; returns its shape.

        Raises:
            InputError: the data are not like those the run was trained on, or ``target`` cannot be a file.
            CorruptError: a cell is damaged.
            StorageError: the disk refused. On every error ``target`` stays as it was.
        """
        check_target(target)
        opened = self._open(data)
        assert opened.test is not None
        shape = (opened.test.rows, *self.nodes[-1].shape)
        with self._prepared(opened, opened.test) as rows, writing_npy(target, shape) as put:
            self._predict(rows, device, put)
        return shape

    def report(self, folder: str | Path | None = None) -> Path:
        """Write ``report.html`` and ``figures/``; see ``edgetrain.report_runs``."""
        from edgetrain.report.page import write_report

        return write_report([self.path], None if folder is None else Path(folder))[0]

    def model(self) -> Model:
        """The trained net as one module on the CPU, in evaluation mode.

        It maps raw rows [B, ...] to class scores [B, C], float32: input scaling, all cells with their heads, and the
        method's vote.
        """
        folder = RunFolder(self.path)
        files = folder.files()
        classifier = _classifier(folder, files)
        statistics = _statistics(folder, files)
        cells = [(cell.module, cell.head) for cell in self._trained_cells()]
        head = classifier.head if classifier else None
        return Model(self.objective, self.shape, statistics, cells, head, self.vote).eval()

    def cells(self) -> nn.Sequential:
        """The trained cells alone on the CPU, in evaluation mode, without input scaling, heads and vote."""
        return nn.Sequential(*(cell.module for cell in self._trained_cells())).eval()

    def _trained_cells(self) -> list[ResidentCell]:
        folder = RunFolder(self.path)
        files, cpu, unused = folder.files(), torch.device("cpu"), OptimizerRecipe("sgd", 1.0)
        with process_state(self.settings):
            setup = Setup(self.objective, unused, cpu)
            plain = [replace(node, channels_last=False) for node in self.nodes]  # contiguous weights can be saved
            return [ResidentCell(node, setup, _read_cell(folder, files, node, self.objective)) for node in plain]

    def _open(self, data: Any) -> DataSet:
        opened = _rows(data, self.shape.reading)
        self.shape.check(opened)
        return replace(opened, pixel_max=self.shape.pixel_max)

    def _own(self) -> DataSet:
        """The run's data set."""
        if self.settings.data == ARRAYS:
            raise InputError(f"{self.path}: was trained on arrays in memory; give the rows to evaluate: (X, y)")
        opened = open_data(self.settings.data, stated_reading(self.settings))
        self.shape.check(opened)
        return opened

    def _held_out(self, rows: DataSet) -> DataSet:
        """The data set whose test rows are those of ``rows`` that the run was not trained on, if it drew them so."""
        if rows.split is None:
            return rows
        try:
            drawn = data_of(self.settings, replace(rows.split(), pixel_max=self.shape.pixel_max))
            if drawn.train is None or drawn.train.rows != self.record.rows:
                return rows
            with self._prepared(drawn, drawn.train) as train:
                return drawn if self._trained_on(train) else rows
        except InputError:  # no split can be drawn from these rows, so none was
            return rows

    def _trained_on(self, rows: Prepared) -> bool:
        saved = RunFolder(self.path).last()
        return saved is not None and saved.data == digest(rows)

    def _rows_in_words(self, data: DataSet, name: str, rows: Prepared) -> str:
        count = f"{rows.x.rows:,}"
        if data.drawn:
            return f"the {count} held-out rows of {name}; the run was trained on the other {self.record.rows:,}"
        if data.split is None:
            return f"the {count} test rows of {name}"
        return f"all {count} rows of {name}{', on which the run was trained' if self._trained_on(rows) else ''}"

    def _prepared(self, data: DataSet, part: Part) -> AbstractContextManager[Prepared]:
        return _prepared(RunFolder(self.path), data, part)

    def _predict(
        self,
        rows: Prepared,
        device: str | None,
        on_latents: Callable[[int, NDArray[np.float32]], None] | None = None,
    ) -> Predictions:
        place = devices.resolve(device or self.settings.device)
        meter, folder = meter_of(place), RunFolder(self.path)
        micro, tiles = self._per_cell(self.decisions.micro_batch), self._per_cell(self.decisions.tiles)
        with process_state(self.settings), TemporaryDirectory(prefix="edgetrain-") as scratch:
            budget, seeds = None, [0] * len(self.nodes)
            if place.type == "cuda":
                work = self._evaluated(place, rows.x.rows)
                budget, seeds = budget_of(self.settings, work), evaluation_seeds(work, micro, tiles)
            pieces = micro, tiles, seeds
            predictor = predictor_of(folder, self.nodes, self.objective, place, meter, pieces, Path(scratch))
            with devices.running_on(place, budget):
                found = predictor.run(FileLatents.of_files({"x": rows.x}, meter.host), rows.y, on_latents)
        if found.missing:
            warnings.warn(EdgetrainWarning(f"{self.path}: {found.missing}"), stacklevel=3)
        return found

    def _per_cell(self, sizes: int | list[int]) -> list[int]:
        """One size for each cell, the classifier's left out.

        Raises:
            CorruptError: the plan is of another number of cells.
        """
        cells = len(self.nodes)
        if not isinstance(sizes, list):
            return [sizes] * cells
        if len(sizes) not in (cells, cells + 1):
            raise CorruptError(f"{self.path / 'config.toml'}: [plan] has sizes of {len(sizes)} cells, not of {cells}")
        return sizes[:cells]

    def _evaluated(self, device: torch.device, rows: int) -> Workload:
        """What the planner must know of reading classes off rows."""
        settings, folder = self.settings, RunFolder(self.path)
        return Workload(
            nodes=self.nodes,
            objective=self.objective,
            optimizer=OptimizerRecipe("sgd", 1.0),
            classifier=None,
            schedule=settings.schedule or "separate",
            classes=self.shape.classes,
            rows=rows,
            test_rows=0,
            batch_size=settings.batch_size,
            epochs=1,
            classifier_epochs=0,
            inputs=replace(self.shape.format, normalization=_statistics(folder, folder.files()).normalization),
            latent_dtype="float32",
            device=device,
            seed=settings.seed,
            prefetch=settings.prefetch,
        )


@contextmanager
def _prepared(folder: RunFolder, data: DataSet, part: Part) -> Iterator[Prepared]:
    """A part's rows, prepared as the run in ``folder`` prepares its own, for as long as they are needed."""
    files = folder.files()
    statistics = _statistics(folder, files)
    with (
        TemporaryDirectory(prefix="edgetrain-") as scratch,
        closing(prepare(data, part, Path(scratch), "rows", statistics)) as rows,
    ):
        yield rows


def digests_of(folder: RunFolder, data: DataSet) -> Digests:
    """Digests of a data set's training and test rows, prepared as the run in ``folder`` prepares its own."""

    def of(part: Part | None) -> str | None:
        if part is None:
            return None
        with _prepared(folder, data, part) as rows:
            return digest(rows)

    return Digests(of(data.train), of(data.test))


def predictor_of(
    folder: RunFolder,
    cells: tuple[Node, ...],
    objective: Objective,
    device: torch.device,
    meter: Meter,
    pieces: tuple[list[int], list[int], list[int]],
    scratch: Path | None = None,
) -> Predictor:
    """A predictor that reads a run's saved cells; ``pieces`` are micro-batches, tiles and seeds of each cell."""
    files = folder.files()
    return Predictor(
        nodes=cells,
        objective=objective,
        device=device,
        meter=meter,
        seed=cells[0].seed,
        micro_batches=pieces[0],
        tiles=pieces[1],
        seeds=pieces[2],
        read_cell=lambda index: _read_cell(folder, files, cells[index], objective),
        classifier=_classifier(folder, files),
        folder=scratch or folder.latents,
    )


def _statistics(folder: RunFolder, files: Files) -> Statistics:
    """By what the run's rows were prepared."""
    return unpack(folder.units.read(files[INPUTS])["weights"]) if INPUTS in files else Statistics()


def _classifier(folder: RunFolder, files: Files) -> CellState | None:
    """The trained classifier, if there is one."""
    if CLASSIFIER not in files:
        return None
    return CellState.of_kinds(folder.units.read(files[CLASSIFIER], optimizer=False))


def _read_cell(folder: RunFolder, files: Files, node: Node, objective: Objective) -> CellState:
    found = files.get(f"{node.index:03}", {})
    if "weights" not in found:
        raise CorruptError(f"{folder.path}: its journal knows no weights of cell {node.index + 1}")
    state = CellState.of_kinds(folder.units.read(found, optimizer=False))
    for module, tensors in zip(shapes_of(node, objective), (state.module, state.head), strict=True):
        for name, own in saved_tensors(module).items():
            if name in tensors and tensors[name].dtype != own.dtype:
                path = folder.units.path_of(found["weights"])
                raise CorruptError(f"{path}: {name} is {tensors[name].dtype}, expected {own.dtype}")
    return state


def _rows(data: Any, reading: Reading) -> DataSet:
    """What to predict on: a data set, or what is to be read: a spec, arrays ``(X, y)``, or rows X."""
    if isinstance(data, DataSet):
        return data
    if isinstance(data, str):
        return open_rows(data, reading)
    if isinstance(data, tuple):
        inputs, labels = data
        return from_rows(inputs, labels, reading=reading)
    return from_rows(data, reading=reading)


def _net(settings: Settings, net: Any) -> Any:
    if net is not None:
        return net
    if ".py:" in (settings.net or "") or settings.net == "modules":
        raise InputError(
            f"net {settings.net!r}: this run's net is your own code; name it again (--net path/to/net.py:function,"
            " or net=... in Python)"
        )
    return settings.net


def read_record(path: Path) -> tuple[RunRecord, Shape]:
    """What a finished run measured, and what its data were like.

    Raises:
        InputError: the folder holds no finished run.
        CorruptError: the record is damaged.
    """
    return parse_record(open_folder(path).read_record(), path)


def parse_record(text: str, path: Path) -> tuple[RunRecord, Shape]:
    """What ``record.json`` of the run in a folder says.

    Raises:
        CorruptError: it is not a record.
    """
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
        shape = msgspec.convert(values.pop("data", None), Shape)
        record = msgspec.convert(_without_controls(values), RunRecord)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path / 'record.json'}: is not a record of edgetrain ({error})") from error
    record.run = str(path.absolute())
    return record, shape


def _without_controls(value: Any) -> Any:
    """JSON whose texts and keys hold no control characters, which a forged record could send to a terminal."""
    if isinstance(value, str):
        return "".join("\ufffd" if unicodedata.category(each) == "Cc" else each for each in value)
    if isinstance(value, list):
        return [_without_controls(each) for each in value]
    if isinstance(value, dict):
        return {_without_controls(name): _without_controls(each) for name, each in value.items()}
    return value
