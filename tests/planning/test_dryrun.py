"""What the dry run predicts is what the meter measures. ``pytest tests/planning/test_dryrun.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from edgetrain.baselines.backprop import Backpropagation
from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.memory.meter import LiveMeter
from edgetrain.nets.spec import open_net
from edgetrain.objectives.base import Objective, nodes
from edgetrain.objectives.lbp import AutoencoderCells, DenoisingAutoencoderCells
from edgetrain.objectives.mf import MonoForward
from edgetrain.planning import dryrun
from edgetrain.planning.dryrun import bench, resident_peak
from edgetrain.planning.workload import Workload
from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import RowFormat
from edgetrain.stream.executor import Executor
from edgetrain.stream.inputs import training_inputs
from edgetrain.stream.latents import FileLatents
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.outputs import Outputs, Tally
from edgetrain.stream.reader import LABELS, LabelFile, Reader
from edgetrain.stream.span import Span
from edgetrain.training.fit import fit

CPU = torch.device("cpu")
METHODS: dict[str, type[Objective]] = {
    "mf": MonoForward,
    "lbp-ae": AutoencoderCells,
    "lbp-dae": DenoisingAutoencoderCells,
    "bp": Backpropagation,
}
BATCH, ROWS, CLASSES = 16, 40, 5


def workload(
    method: str,
    net: Any,
    shape: tuple[int, ...] = (1, 8, 8),
    schedule: str = "separate",
    optimizer: str = "adam",
    latent_dtype: str = "float32",
    pixels: bool = True,
    batch: int = BATCH,
    rows: int = ROWS,
    prefetch: int = 2,
) -> Workload:
    kind = METHODS[method]
    opened = open_net(net, shape, (MonoForward if method == "bp" else kind).net_defaults)
    reads_all = kind.vote == "classifier"
    objective = kind(CLASSES, opened.options, trains_classifier=reads_all)
    return Workload(
        nodes=tuple(nodes(objective.join(list(opened.cells)), shape, 0)),
        objective=objective,
        optimizer=OptimizerRecipe(optimizer, 1e-3),
        classifier=OptimizerRecipe(optimizer, 1e-3) if reads_all else None,
        schedule=schedule,
        classes=CLASSES,
        rows=rows,
        test_rows=0,
        batch_size=batch,
        epochs=1,
        classifier_epochs=1 if reads_all else 0,
        inputs=RowFormat(shape, "pixels" if pixels else "float32"),
        latent_dtype=latent_dtype,
        device=CPU,
        seed=0,
        prefetch=prefetch,
    )


def stored(folder: Path, name: str, rows: int, layout: RowFormat, host: Any) -> FileLatents:
    """Random rows of a format, in a file."""
    dtype = torch.uint8 if layout.dtype == "pixels" else torch.float32
    values = (torch.rand(rows, *layout.shape, generator=torch.Generator().manual_seed(1)) * 200).to(dtype)
    file = LatentFile(folder / name, rows, layout).allocate()
    file.write(0, layout.encode(values))
    return FileLatents.of_files({"x": file}, host)


def labels(folder: Path, work: Workload) -> LatentFile:
    file = LatentFile(folder / "y", work.rows, LABELS).allocate()
    file.write(0, LABELS.encode(torch.arange(work.rows) % work.classes))
    return file


def cell_peak(*arguments: Any) -> int:
    return dryrun.cell_peak(*arguments).bytes


def measured(work: Workload, index: int, micro: int, folder: Path, full: bool = False) -> int:
    """The meter's peak of a real visit, with real files, as the trainer makes it."""
    meter = LiveMeter(full)
    executor = Executor(meter, work.seed)
    with meter.watch():
        cell = work.builder(CPU, meter.host).build(index)
    source = stored(folder, "in", work.rows, work.format_into(index), meter.host).source()
    prepare = None if index else training_inputs(work.objective)
    reader = Reader([source], LabelFile(labels(folder, work)), CPU, meter.host, work.prefetch, prepare)
    out = FileLatents(
        folder,
        "out",
        work.rows,
        work.latent_dtype,
        work.emits_in_training,
        meter.host,
        lambda size: None,
        lambda size: None,
        background=work.prefetch > 0,
    )
    order = np.random.default_rng(0).permutation(work.rows)
    sink = out.sink() if work.emits(index) else None
    with meter.watch():
        tally = Tally(CPU)
    for epoch in range(2):  # where an epoch is one step, only the second finds the optimizer's state there
        span = Span(work.rows, work.batch_size, micro, 0, work.steps, order, epoch=epoch)
        executor.train(cell, reader, span, Outputs(tally, sink if work.emits_in_training else None))
        if sink is not None and work.emits_in_training:
            sink.close()
            sink = out.reused("out", step_order=True).sink()
    if sink is not None and not work.emits_in_training:
        span = Span(work.rows, work.batch_size, micro, 0, work.steps)
        executor.run("emit", cell, reader, span, Outputs(sink=sink))
    if sink is not None:
        sink.close()
    with meter.watch():
        tally.read()
    return meter.cell_peak


NETS = {"mlp": "mlp:30,20", "cnn": "cnn:6,8"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("micro", [5, 16])
def test_the_predicted_peak_is_the_measured_one(method: str, net: str, micro: int, tmp_path: Path) -> None:
    work = workload(method, NETS[net])
    for index in range(work.depth):
        assert cell_peak(work, index, micro) == measured(work, index, micro, tmp_path)


@pytest.mark.parametrize("method", ["mf", "lbp-ae", "lbp-dae"])
@pytest.mark.parametrize("micro", [3, 16])
def test_the_predicted_peak_is_the_measured_one_when_latents_are_emitted_in_training(
    method: str, micro: int, tmp_path: Path
) -> None:
    work = workload(method, "mlp:30,20", schedule="sequence")
    for index in range(work.depth):
        assert cell_peak(work, index, micro) == measured(work, index, micro, tmp_path)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adamax", "sgd"])
@pytest.mark.parametrize("method", ["mf", "bp"])
def test_every_optimizer_is_predicted(method: str, optimizer: str, tmp_path: Path) -> None:
    work = workload(method, "mlp:30,20", optimizer=optimizer)
    scalars = 64 if optimizer == "adamax" else 0  # not fused: a few numbers of the host's look different
    assert 0 <= cell_peak(work, 0, 16) - measured(work, 0, 16, tmp_path) <= scalars


@pytest.mark.parametrize("latent_dtype", ["float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("schedule", ["separate", "sequence"])
def test_narrow_latents_are_predicted(latent_dtype: str, schedule: str, tmp_path: Path) -> None:
    work = workload("mf", "mlp:200,20", (20,), schedule, latent_dtype=latent_dtype, pixels=False)
    for index in range(work.depth):
        assert cell_peak(work, index, 16) == measured(work, index, 16, tmp_path)


@pytest.mark.parametrize(
    ("latent_dtype", "schedule"),
    [
        ("float32", "separate"),
        ("uint8", "separate"),
        ("float32", "sequence"),
        ("uint8", "sequence"),
    ],
)
def test_writing_without_a_thread_takes_nothing_of_the_device(latent_dtype: str, schedule: str, tmp_path: Path) -> None:
    work = workload(
        "mf", "mlp:8x2", (8,), schedule, latent_dtype=latent_dtype, pixels=False, prefetch=0, batch=64, rows=128
    )
    assert cell_peak(work, 0, 64) == measured(work, 0, 64, tmp_path)


@pytest.mark.parametrize("rows", [1, 7, 16, 17])
def test_a_data_set_smaller_than_a_batch_is_predicted(rows: int, tmp_path: Path) -> None:
    work = workload("mf", "mlp:30,20", rows=rows)
    assert cell_peak(work, 0, min(16, rows)) == measured(work, 0, min(16, rows), tmp_path)


def test_measuring_every_step_finds_no_more_than_the_first_ones(tmp_path: Path) -> None:
    work = workload("lbp-dae", "mlp:30,20")
    assert measured(work, 0, 5, tmp_path, full=True) == measured(work, 0, 5, tmp_path)


class Orthogonal(nn.Linear):
    """First weights that take a lot of room to draw."""

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


def build_orthogonal() -> list[nn.Module]:
    return [Orthogonal(64, 64), nn.Linear(64, 8)]


def test_drawing_first_weights_takes_nothing_of_the_device(tmp_path: Path) -> None:
    work = workload("mf", build_orthogonal, (64,), optimizer="sgd", pixels=False, batch=2)
    assert cell_peak(work, 0, 2) == measured(work, 0, 2, tmp_path)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=(Phase.explicit, Phase.generate),  # shrinking would repeat real training hundreds of times
)
@given(
    method=st.sampled_from(sorted(METHODS)),
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    inputs=st.integers(1, 60),
    batch=st.integers(1, 40),
    micro=st.integers(1, 40),
    schedule=st.sampled_from(["separate", "sequence"]),
)
def test_random_nets_are_predicted(
    method: str, widths: list[int], inputs: int, batch: int, micro: int, schedule: str, tmp_path: Path
) -> None:
    schedule = "separate" if method == "bp" else schedule
    work = workload(method, f"mlp:{','.join(map(str, widths))}", (inputs,), schedule, pixels=False, batch=batch)
    size = min(micro, batch, work.rows)
    for index in range(work.depth):
        assert cell_peak(work, index, size) == measured(work, index, size, tmp_path)


@pytest.mark.parametrize("micro", [4, 16])
@pytest.mark.parametrize(
    ("resident", "optimizer"),
    [(True, "adamw"), (False, "adamw"), (True, "adamax"), (False, "adamax")],
)
def test_the_classifiers_peak_is_the_measured_one(resident: bool, micro: int, optimizer: str, tmp_path: Path) -> None:
    work, meter = workload("lbp-ae", "mlp:30,20,9", optimizer=optimizer), LiveMeter()
    cells = [
        stored(tmp_path, str(index), work.rows, work.format_into(index + 1), meter.host) for index in range(work.depth)
    ]
    assert work.classifier is not None
    with meter.watch():
        made = work.builder(CPU, meter.host, resident).build(work.depth)
        tally = Tally(CPU)
    reader = Reader([cell.source() for cell in cells], LabelFile(labels(tmp_path, work)), CPU, meter.host)
    order = np.random.default_rng(0).permutation(work.rows)
    span = Span(work.rows, BATCH, micro, 0, work.steps, order)
    Executor(meter, 0).train(made, reader, span, Outputs(tally))
    scalars = 64 if optimizer == "adamax" else 0
    assert 0 <= cell_peak(work, work.depth, micro, 1, resident) - meter.cell_peak <= scalars


def run_of(method: str, placement: Any, path: Path) -> Any:
    """The record of a small run."""
    source = np.random.default_rng(0)
    data = from_arrays((source.integers(0, 256, (40, 6, 6), np.uint8), np.arange(40) % 5))
    wanted = Settings(
        method=method, net="mlp:30,20", epochs=2, batch_size=16, device="cpu", threads=1, placement=placement
    )
    return fit(wanted, path, data=data).record


@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_run_measures_what_was_predicted_for_each_cell(method: str, tmp_path: Path) -> None:
    record = run_of(method, "stream", tmp_path / "run")
    visits = record.visits
    found = [cell.peak_gpu_mb for cell in visits]
    assert found == [cell.predicted_peak_mb for cell in visits]
    assert record.peak_gpu_mb == record.predicted_peak_mb == max(found)


@pytest.mark.parametrize("method", ["bp", "mf", "lbp-ae", "lbp-dae"])
def test_a_resident_run_measures_what_was_predicted(method: str, tmp_path: Path) -> None:
    record = run_of(method, "resident", tmp_path / "run")
    assert record.peak_gpu_mb == record.predicted_peak_mb


# --- the dry run itself -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_cells_of_equal_signature_have_equal_peaks(method: str) -> None:
    work = workload(method, "mlp:30x4", (30,), pixels=False)
    if method == "bp":
        again = workload(method, "mlp:30x4", (30,), pixels=False)
        assert work.nodes[0].recipe.signature == again.nodes[0].recipe.signature
        assert cell_peak(work, 0, 16) == cell_peak(again, 0, 16)
        return
    assert len({node.recipe.signature for node in work.nodes if node.recipe}) == 1
    assert len({cell_peak(work, index, 16) for index in (1, 2)}) == 1


@pytest.mark.parametrize("method", ["mf", "lbp-ae"])
def test_a_cells_peak_does_not_depend_on_the_depth_of_the_net(method: str) -> None:
    peaks = {max(cell_peak(workload(method, f"mlp:30x{depth}"), index, 16) for index in (0, 1)) for depth in (3, 9)}
    assert len(peaks) == 1


def test_backpropagations_peak_grows_with_every_layer() -> None:
    peaks = [cell_peak(workload("bp", f"mlp:64x{depth}"), 0, 16) for depth in (2, 3, 4, 5)]
    steps = np.diff(peaks)
    assert len(set(steps.tolist())) == 1
    assert steps[0] >= 16 * 64 * 64  # weight, gradient and two moments


def test_a_dry_run_takes_no_memory_and_leaves_nothing_behind() -> None:
    work = workload("mf", "mlp:60000", (60_000,), batch=4, rows=4, pixels=False)
    state = torch.random.get_rng_state()
    assert cell_peak(work, 0, 4) > 16 * 60_000**2  # 57 GB of weights, moments and gradients
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not isinstance(torch.zeros(1), torch._subclasses.FakeTensor)


def test_a_bench_that_fails_leaves_real_tensors() -> None:
    with pytest.raises(KeyError), bench(CPU):
        raise KeyError
    assert torch.ones(2).sum().item() == 2


def test_a_resident_run_holds_the_data_and_all_cells() -> None:
    work = workload("mf", "mlp:30,20")
    whole, peaks = resident_peak(work, [16, 16])
    assert whole == max(peaks)
    assert whole > cell_peak(work, 0, 16)
    larger, _ = resident_peak(workload("mf", "mlp:30,20", rows=80), [16, 16])
    added = 40 * (64 + 8)  # pixels and labels of 40 more rows
    assert larger - whole >= added


@pytest.mark.parametrize("schedule", ["separate", "sequence"])
@pytest.mark.parametrize("batch", [36, 50, 69, 70, 90])
def test_a_resident_run_s_last_batch_may_be_any_part_of_one(schedule: str, batch: int, tmp_path: Path) -> None:
    rows = from_arrays((np.zeros((70, 30), np.float32), np.arange(70) % CLASSES))
    asked = Settings(
        method="mf", net="mlp:30,20", schedule=schedule, batch_size=batch, epochs=2, placement="resident", threads=1
    )
    record = fit(asked, tmp_path / "run", data=rows).record
    assert record.peak_gpu_mb == record.predicted_peak_mb


@pytest.mark.parametrize("net", ["cnn:2,16", "mlp:30,20"])
def test_a_loss_s_own_mean_keeps_no_room_that_the_dry_run_does_not_see(net: str, tmp_path: Path) -> None:
    rows = from_arrays((np.random.default_rng(0).random((256, 1, 8, 8), np.float32), np.arange(256) % CLASSES))
    asked = Settings(method="predsim", net=net, batch_size=128, epochs=1, threads=1)
    record = fit(asked, tmp_path / "run", data=rows).record
    assert record.peak_gpu_mb == record.predicted_peak_mb


def test_for_cuda_the_allocators_reserve_is_predicted_without_a_gpu() -> None:
    work = workload("mf", "mlp:30,20")
    on_cuda = cell_peak(replace(work, device=torch.device("cuda")), 0, 16)
    assert on_cuda > cell_peak(work, 0, 16)
    assert on_cuda % (1 << 20) == 0  # whole segments
