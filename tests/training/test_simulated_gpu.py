"""Whole runs on a simulated CUDA (``tests/simulated_cuda.py``): bits, races, budgets, faults.

``pytest tests -k simulated``
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from machine import BATCH, ROWS, assert_same, data, settings, stopped_after, units
from simulated_cuda import MixedDevicesError, RaceError, SimulatedCuda, simulated_cuda

from edgetrain.config import Settings
from edgetrain.data.arrays import from_arrays
from edgetrain.data.layout import Reading
from edgetrain.errors import BudgetError, EdgetrainWarning
from edgetrain.memory import device as devices
from edgetrain.memory import queues
from edgetrain.planning import dryrun
from edgetrain.planning.probe import Probe
from edgetrain.store.edit import open_folder
from edgetrain.store.rows import RowFormat
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import ResidentCell
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.latents import FileLatents
from edgetrain.stream.reader import LabelFile, Reader
from edgetrain.stream.span import Span
from edgetrain.training.edits import append
from edgetrain.training.fit import fit
from edgetrain.training.job import host_tier, open_job, plan_job
from edgetrain.training.methods import METHODS
from edgetrain.training.run import Run
from edgetrain.units import MIB, from_mb, to_mb

pytestmark = pytest.mark.usefixtures("one_thread")
STREAM = {"placement": "stream"}
TILES = {"tiles": 2, "placement": "stream", "net": "mlp:70,33"}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{name}, streamed": (name, "pixels", STREAM) for name in METHODS if name not in ("lbp-cae", "sll+")},
    "lbp-cae, streamed": ("lbp-cae", "images", {**STREAM, "net": "cnn:4,6"}),
    "sll+, streamed": ("sll+", "wide images", {**STREAM, "net": "vit:depth=2,width=8,heads=2,patch=2"}),
    "mf, resident": ("mf", "pixels", {"placement": "resident"}),
    "mf, sequence, uint8": ("mf", "pixels", {**STREAM, "schedule": "sequence", "latent_dtype": "uint8"}),
    "mf, resident, sequence, uint8": (
        "mf", "pixels", {"placement": "resident", "schedule": "sequence", "latent_dtype": "uint8"},
    ),
    "mf, tiles": ("mf", "pixels", TILES),
    "sll, tiles": ("sll", "pixels", TILES),
    "ff, tiles, classifier": ("ff", "pixels", {**TILES, "classifier_epochs": 1}),
    "ff, resident, classifier": ("ff", "pixels", {"placement": "resident", "classifier_epochs": 1}),
    "lbp-ae, sequence, micro-batches": ("lbp-ae", "pixels", {**STREAM, "schedule": "sequence", "micro_batch": 5}),
    "mf, augmentation, views": ("mf", "images", {**STREAM, "net": "cnn:4,6", "augment": "crop", "views": 2}),
    "predsim, augmentation": ("predsim", "images", {**STREAM, "net": "cnn:4,6", "augment": "crop,flip"}),
    "mf, dropout": ("mf", "pixels", {**STREAM, "net": "mlp:23x2;dropout=0.3"}),
}  # fmt: skip


def run(path: Any, method: str = "mf", kind: str = "pixels", device: str = "cuda", **values: Any) -> Run:
    return fit(settings(method, **{"epochs": 1, **values, "device": device}), path, data=data(kind).set)


@pytest.mark.parametrize("case", RUNS)
def test_a_simulated_run_gives_the_bits_of_a_cpu_run_within_its_predicted_peak(tmp_path, case):
    method, kind, values = RUNS[case]
    on_cpu = run(tmp_path / "cpu", method, kind, "cpu", **values)
    with simulated_cuda() as cuda:
        found = run(tmp_path / "gpu", method, kind, **values)
        assert cuda.memories[0].served > 100
        assert cuda.memories[1].served == 0
        held = data(kind)
        scores = found.evaluate((held.raw[ROWS:], held.labels[ROWS:]), device="cuda").scores
    assert_same(units(found.path), units(on_cpu.path))
    record = found.record
    assert record.peak_gpu_mb == to_mb(cuda.peak)
    assert record.peak_gpu_mb <= record.predicted_peak_mb <= record.peak_gpu_mb + 2
    own = on_cpu.evaluate((held.raw[ROWS:], held.labels[ROWS:])).scores
    assert all(np.array_equal(scores[vote], own[vote]) for vote in own)


def test_a_simulated_run_on_the_second_gpu_touches_nothing_on_the_first(tmp_path):
    with simulated_cuda() as cuda:
        found = run(tmp_path / "run", device="cuda:1", **STREAM)
        found.predict(data("pixels").raw[ROWS:], device="cuda:1")
    assert cuda.memories[0].served == 0
    assert cuda.memories[1].served > 100


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (queues, "wait"),  # the computation does not wait for the copy
        (queues.Copies, "wait"),  # the copy does not wait for who reads the slot
        (queues.Event, "synchronize"),  # the host does not wait before it fills a buffer again
    ],
    ids=["the computation", "the copy", "the host"],
)
def test_a_simulated_run_in_which_somebody_does_not_wait_is_a_race(tmp_path, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *arguments: None)
    with simulated_cuda(), pytest.raises(RaceError):
        run(tmp_path / "run", epochs=2, **STREAM)


@pytest.mark.parametrize("waits", [True, False])
def test_a_simulated_first_copy_waits_for_who_had_its_memory_before(tmp_path, monkeypatch, waits):
    if not waits:
        monkeypatch.setattr(queues.Copies, "after_compute", lambda self: None)
    latents = FileLatents(tmp_path, "1", 8, "float32", False, nullcontext, lambda size: None, lambda size: None)
    sink = latents.sink()
    sink.put(0, {"x": torch.ones(8, 256)})
    sink.close()
    place = torch.device("cuda", 0)
    with simulated_cuda(), devices.active(place):
        torch.ones(4 * 256, device=place).add_(1)  # as large as a slot, whose memory it leaves
        reader = Reader([latents.source()], LabelFile(None), place)
        draws = partial(StepDraws, 0, 0, 0)
        with (
            nullcontext() if waits else pytest.raises(RaceError),
            reader.batches(Span(8, 4, 4, 0, 2), (0,), draws) as batches,
        ):
            for batch in batches:
                for micro in batch.micro_batches():
                    assert micro.read().streams["x"].sum().item() == 4 * 256


class Abandoned(Exception):  # noqa: N818 (it is not one of our errors)
    """Ends a run in the middle of a step."""


def abandon_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the first visit end while the next micro-batch is on its way."""
    train_step = ResidentCell.train_step

    def ends(self: ResidentCell, batch: Any, out: Any) -> None:
        train_step(self, batch, out)
        if batch.step == step and self.index == 0:
            raise Abandoned

    monkeypatch.setattr(ResidentCell, "train_step", ends)


@pytest.mark.usefixtures("peaks_unknown")
@pytest.mark.parametrize("waits", [True, False])
def test_a_simulated_run_that_ends_early_gives_no_memory_back_that_a_copy_still_fills(tmp_path, monkeypatch, waits):
    """What comes after a pause or an exception may get the slots' memory."""
    if not waits:
        monkeypatch.setattr(queues.Copies, "before_compute", lambda self: None)
        monkeypatch.setattr(queues.Event, "synchronize", lambda self: None)
    abandon_at(monkeypatch, 2)
    place = torch.device("cuda", 0)
    with simulated_cuda(), devices.active(place):
        with suppress(Abandoned):
            run(tmp_path / "run", epochs=2, **STREAM)
        with nullcontext() if waits else pytest.raises(RaceError):
            taken = [torch.zeros(300, dtype=torch.uint8, device=place) for _ in range(400)]
            assert len(taken) == 400


def test_a_simulated_run_that_is_paused_goes_on_to_the_same_bits(tmp_path):
    asked = settings("mf", device="cuda", epochs=2, **STREAM)
    with simulated_cuda():
        stopped_after(7, asked, tmp_path / "run", data("pixels").set)
        fit(asked, tmp_path / "run", data=data("pixels").set, resume=True)
    assert_same(units(tmp_path / "run"), units(run(tmp_path / "cpu", device="cpu", epochs=2, **STREAM).path))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mf", "lbp-ae"])
def test_a_simulated_run_that_was_killed_after_every_checkpoint_ends_the_same(tmp_path, monkeypatch, method):
    save = RunFolder.save

    def saves_and_dies(folder: RunFolder, *arguments: Any) -> None:
        save(folder, *arguments)
        raise Abandoned

    path, asked = tmp_path / "run", settings(method, device="cuda", epochs=1, checkpoint_every=0.0, **STREAM)
    with simulated_cuda(), monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", saves_and_dies)
        for _ in range(40):
            with suppress(Abandoned):
                fit(asked, path, data=data("pixels").set, resume=path.exists())
            if (path / "record.json").exists():
                break
    assert_same(units(path), units(run(tmp_path / "cpu", method, device="cpu", **STREAM).path))


def test_a_simulated_run_that_runs_out_of_memory_tries_once_more_within_the_same_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(Probe, "scratch_bytes", lambda *arguments: 0)  # which would find it
    with simulated_cuda(fails_at=300) as cuda:
        limits: list[float] = []
        real = SimulatedCuda.set_per_process_memory_fraction

        def notes(self: SimulatedCuda, fraction: float, device: torch.device) -> None:
            limits.append(fraction)
            real(self, fraction, device)

        SimulatedCuda.set_per_process_memory_fraction = notes  # type: ignore[method-assign]
        try:
            found = run(tmp_path / "run", **STREAM)
        finally:
            SimulatedCuda.set_per_process_memory_fraction = real  # type: ignore[method-assign]
    assert found.record.cells[0].micro_batch == BATCH // 2
    assert found.record.budget_mb == to_mb(cuda.total * 9 // 10)  # not 90% of what is left beside the run itself
    assert len(set(limits) - {1.0}) == 1


@pytest.mark.slow
def test_a_simulated_run_obeys_the_smallest_budget_and_a_smaller_one_is_refused(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (700, 784), np.uint8)
    wide = from_arrays((rows, np.arange(700) % 4), reading=Reading("image"))
    asked = Settings().with_values(
        {"method": "ff", "net": "mlp:900", "batch_size": 512, "epochs": 1, "threads": 1, "device": "cuda", **STREAM}
    )
    with simulated_cuda() as cuda:
        plan = plan_job(open_job(asked, data=wide))
        budget, cuda.peak = to_mb(plan.min_budget), 0
        found = fit(asked.with_values({"max_gpu_mb": budget}), tmp_path / "run", data=wide)
        assert cuda.peak <= plan.min_budget
        assert found.record.peak_gpu_mb <= budget
        with pytest.raises(BudgetError, match="smallest"):
            fit(asked.with_values({"max_gpu_mb": budget - 1}), tmp_path / "less", data=wide)


@pytest.mark.parametrize("rows", [700, 1030, 1024])
@pytest.mark.parametrize("method", ["mf", "ff", "lbp-ae"])
def test_simulated_short_last_batches_stay_within_the_predicted_peak(tmp_path, method, rows):
    """A short batch moves tensors between the allocator's pools, which a dry run of full batches does not see."""
    values = np.random.default_rng(0).integers(0, 256, (rows, 784), np.uint8)
    wide = from_arrays((values, np.arange(rows) % 4), reading=Reading("image"))
    asked = Settings().with_values(
        {"method": method, "net": "mlp:600", "batch_size": 512, "epochs": 1, "device": "cuda", **STREAM}
    )
    with simulated_cuda() as cuda:
        record = fit(asked, tmp_path / "run", data=wide).record
    assert to_mb(cuda.peak) == record.peak_gpu_mb <= record.predicted_peak_mb


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["stream", "resident"])
def test_scratch_memory_of_kernels_is_found_by_trying_a_cell_of_each_kind(tmp_path, placement, monkeypatch):
    """Workspaces of cuDNN and the like are no tensors: the dry run cannot see them."""
    with simulated_cuda(scratch=30 * MIB):
        found = run(tmp_path / "run", placement=placement).record
        assert 30 < found.peak_gpu_mb <= found.predicted_peak_mb <= found.peak_gpu_mb + 22
        with pytest.raises(BudgetError, match="cannot hold"):
            run(tmp_path / "small", placement=placement, max_gpu_mb=30.0)
        monkeypatch.setattr(Probe, "scratch_bytes", lambda *arguments: 0)
        with pytest.raises(BudgetError, match="out of memory although the predicted peak was"):
            run(tmp_path / "unseen", placement=placement, max_gpu_mb=30.0)


def test_a_cell_of_which_kernels_take_more_gets_smaller_micro_batches(monkeypatch):
    """On this device a sample takes 1 MiB more than the dry run predicts."""
    tried = []

    def scratch_bytes(probe, work, index, micro_batch, tiles, predicted):
        tried.append((index, micro_batch))
        return micro_batch * MIB

    monkeypatch.setattr(Probe, "scratch_bytes", scratch_bytes)
    asked = settings("mf", device="cuda", **STREAM).with_values({"micro_batch": None})
    with simulated_cuda():
        free = plan_job(open_job(asked, data=data("pixels").set))
        assert tried == [(index, BATCH) for index in range(3)]
        assert free.micro_batches == [BATCH] * 3
        tried.clear()
        tight = plan_job(open_job(asked.with_values({"max_gpu_mb": 11.0}), data=data("pixels").set))
    assert tight.fits
    assert tight.micro_batches == [BATCH // 2] * 3
    assert tight.predicted_peak == free.predicted_peak - BATCH // 2 * MIB
    assert tried[:2] == [(0, BATCH), (0, BATCH // 2)]


def test_seeding_the_simulated_pool_reserves_less(monkeypatch):
    values = np.zeros((1024, 784), np.uint8)
    wide = from_arrays((values, np.arange(1024) % 4), reading=Reading("image"))
    asked = Settings().with_values({"method": "ff", "net": "mlp:1000", "batch_size": 512, "device": "cuda", **STREAM})
    with simulated_cuda():
        job = open_job(asked, data=wide)
        seeded = dryrun.visited(job.work, 0, 512).seeded
        assert seeded.seed >= 10 * MIB
        assert seeded.bytes < dryrun.visited(job.work, 0, 512).peak


def test_simulated_latents_are_encoded_on_the_device_streamed_and_resident(tmp_path, monkeypatch):
    encode, seen = RowFormat.encode, Counter()

    def notes(self: RowFormat, values: torch.Tensor) -> torch.Tensor:
        seen[values.device.type] += self.dtype == "uint8"
        return encode(self, values)

    monkeypatch.setattr(RowFormat, "encode", notes)
    with simulated_cuda() as cuda:
        monkeypatch.setattr(dryrun._NoFile, "put", lambda self, first, streams: None)
        for placement in ("stream", "resident"):
            before = seen["cuda"]
            run(tmp_path / placement, latent_dtype="uint8", placement=placement)
            assert seen["cuda"] > before
    assert cuda.memories[0].served > 100


def test_a_simulated_evaluation_is_capped_as_the_run_was(tmp_path):
    with simulated_cuda() as cuda:
        found = run(tmp_path / "run", max_gpu_mb=8.0, **STREAM)
        limits: list[int | None] = []
        allocate = cuda.allocate

        def notes(index: int, key: int, size: int) -> int:
            limits.append(cuda.memories[index].model.limit_bytes)
            return allocate(index, key, size)

        cuda.allocate = notes  # type: ignore[method-assign]
        found.predict(data("pixels").raw[ROWS:])
        assert limits
        assert all(limit is not None and limit <= 8 * MIB for limit in limits)
        assert cuda.memories[0].model.limit_bytes is None  # and free again


@pytest.mark.slow
def test_a_simulated_run_is_edited(tmp_path):
    with simulated_cuda():
        run(tmp_path / "run", **STREAM)
        append(tmp_path / "run", "mlp:23x4", data=data("pixels").set)
        assert len(Run.open(tmp_path / "run").nodes) == 4
    assert open_folder(tmp_path / "run").is_finished()


@pytest.mark.parametrize("free", [1 << 30, 8 << 30])
def test_simulated_unified_memory_is_one_pool(tmp_path, monkeypatch, free):
    memory = psutil.virtual_memory()._replace(total=free, available=free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with simulated_cuda(integrated=True, total=free):
        job = open_job(settings("mf", device="cuda"), data=data("pixels").set)
        plan = plan_job(job)
        assert plan.budget is not None
        assert plan.budget + host_tier(job, plan) <= free * 9 // 10


def test_settings_of_the_allocator_that_the_plan_does_not_know_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with simulated_cuda(), pytest.warns(EdgetrainWarning, match="expandable_segments:True.*unset it"):
        run(tmp_path / "run", **STREAM)


def test_a_simulated_context_that_counts_is_taken_off_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "context_bytes", lambda device: from_mb(100.0))
    with simulated_cuda() as cuda:
        found = run(tmp_path / "run", max_gpu_mb=108.0, count_context=True, **STREAM)
        assert cuda.peak <= 8 * MIB
    assert found.record.budget_mb == 108.0


#: Reads by the host within a step of the first cell, which wait for the device, by method; others have none.
READS_IN_A_STEP = {"sll": 1, "predsim": 1, "bp-offload": 11}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("lbp-cae", "sll+", "bp-stream")])
def test_simulated_reads_by_the_host_within_a_step(tmp_path, monkeypatch, method):
    """One where latents are emitted in training: the sink's copy to the host. Offloading is copying.

    ``bp-stream`` brings every layer back to the host in every step.
    """
    train_step, found = ResidentCell.train_step, []
    with simulated_cuda() as cuda:

        def counts(self: ResidentCell, batch: Any, out: Any) -> None:
            before = cuda.host_reads.total()
            train_step(self, batch, out)
            if self.index == 0 and cuda.mode is not None:
                found.append(cuda.host_reads.total() - before)

        monkeypatch.setattr(ResidentCell, "train_step", counts)
        run(tmp_path / "run", method, **STREAM)
    assert found[-2] == READS_IN_A_STEP.get(method, 0)


def test_the_simulated_device_refuses_to_mix_memories():
    with simulated_cuda(), devices.active(torch.device("cuda", 0)):
        there = torch.ones(3, device="cuda:0")
        assert there.device == torch.device("cuda", 0)
        with pytest.raises(MixedDevicesError):
            there + torch.ones(3)
        with pytest.raises(MixedDevicesError):
            there + torch.ones(3, device="cuda:1")
        assert (there + torch.tensor(1.0)).sum().item() == 6


def test_the_simulated_device_runs_out_of_memory_at_its_cap():
    with simulated_cuda() as cuda, devices.running_on(torch.device("cuda", 0), 24 * MIB):
        torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
        assert cuda.memories[0].model.reserved_bytes <= 24 * MIB


def test_page_locked_memory_is_for_cuda_alone():
    assert not queues.copies_async(torch.device("mps"))  # MPS may still read a buffer that is filled again
    assert queues.copies(torch.device("mps")) is None
    assert queues.copies(torch.device("cpu")) is None
