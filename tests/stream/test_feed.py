"""Batches on their way to the device, from files and from the device. ``pytest tests/stream/test_feed.py``."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgetrain.stream.feed import LABELS, DeviceFeed, Feed, FileFeed, HostBatch, Part, Slice, Transfer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetrain.errors import StorageError
from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import LATENT_DTYPES, RowFormat
from edgetrain.stream.latents import DeviceLatents, FileLatents

CPU = torch.device("cpu")
fuzzing = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run ``work`` in a thread; fail when it hangs."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return found[0]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("edgetrain-")]


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    rows = draw(st.integers(1, 40))
    batch = draw(st.integers(1, 45))
    steps = -(-rows // batch)
    first = draw(st.integers(0, steps - 1))
    order = draw(st.none() | st.permutations(range(rows)))
    return Slice(
        rows,
        batch,
        draw(st.integers(1, batch)),
        first,
        draw(st.integers(first + 1, steps)),
        None if order is None else np.array(order, np.int64),
        draw(st.integers(1, 3)),
    )


def latents(folder: Path, rows: int, dtype: str = "float32", step_order: bool = False) -> FileLatents:
    """Two streams of random latents in files."""
    source = torch.Generator().manual_seed(rows)
    made = FileLatents(folder, "001", rows, dtype, step_order, nullcontext, lambda size: None, lambda size: None)
    sink = made.sink()
    sink.put(0, {"x": torch.randn(rows, 3, generator=source), "neg": torch.randn(rows, 2, 2, generator=source)})
    sink.close()
    return made


def labels(folder: Path, rows: int) -> LatentFile:
    file = LatentFile(folder / "y.rows", rows, LABELS).allocate()
    file.write(0, LABELS.encode(torch.arange(rows) * 7))
    return file


def copies(parts: Iterator[Part]) -> list[tuple[Any, ...]]:
    """What each part shows; a part is valid only until the next."""
    return [
        (
            (part.step, part.phase, part.start, part.size, part.first, part.last, part.closes),
            {name: value.clone() for name, value in part.streams.items()},
            part.y.clone(),
        )
        for part in parts
    ]


def assert_same(left: list[tuple[Any, ...]], right: list[tuple[Any, ...]]) -> None:
    assert [part[0] for part in left] == [part[0] for part in right]
    for one, other in zip(left, right, strict=True):
        assert one[1].keys() == other[1].keys()
        assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
        assert torch.equal(one[2], other[2])


@fuzzing
@given(
    work=slices(),
    dtype=st.sampled_from(LATENT_DTYPES),
    step_order=st.booleans(),
    depth=st.integers(0, 3),
)
def test_files_and_the_device_give_the_same_parts(
    work: Slice, dtype: str, step_order: bool, depth: int, tmp_path: Path
) -> None:
    source, y = latents(tmp_path, work.rows, dtype, step_order), labels(tmp_path, work.rows)
    try:
        from_files = within(20, lambda: copies(FileFeed(source, y, CPU, nullcontext, depth).parts(work)))
        on_device = DeviceFeed(DeviceLatents.copied(source, CPU, nullcontext), torch.arange(work.rows) * 7)
        assert_same(from_files, copies(on_device.parts(work)))
    finally:
        source.free()
        y.delete()
    assert threads() == []


@fuzzing
@given(work=slices())
def test_parts_cover_each_batch_in_each_phase_in_order(work: Slice, tmp_path: Path) -> None:
    source, y = latents(tmp_path, work.rows), labels(tmp_path, work.rows)
    out = torch.empty(work.rows, 12, dtype=torch.uint8)
    source.files["x"].read(slice(0, work.rows), out)
    values = RowFormat((3,)).decode(out).clone()
    parts = copies(FileFeed(source, y, CPU, nullcontext, 2).parts(work))
    source.free()
    y.delete()
    order = np.arange(work.rows) if work.order is None else work.order
    for step, start, stop in work.steps():
        assert stop - start == min(work.batch_size, work.rows - start)
        own = [part for part in parts if part[0][0] == step]
        for phase in range(work.phases):
            of_phase = [part for part in own if part[0][1] == phase]
            assert all(part[0][2:4] == (start, stop - start) for part in of_phase)
            assert all(0 < part[0][5] - part[0][4] <= work.micro_batch for part in of_phase)
            assert [part[0][6] for part in of_phase] == [False] * (len(of_phase) - 1) + [True]
            samples = torch.from_numpy(order[start:stop].copy())
            assert torch.equal(torch.cat([part[1]["x"] for part in of_phase]), values[samples])
            assert torch.equal(torch.cat([part[2] for part in of_phase]), samples * 7)
        assert [part[0][1] for part in own] == sorted(part[0][1] for part in own)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("view", [0, 1, 2])
def test_views_lie_one_behind_the_other_and_share_their_labels(view: int, ordered: bool, tmp_path: Path) -> None:
    source, y = latents(tmp_path, 3 * 11), labels(tmp_path, 11)
    order = np.random.default_rng(0).permutation(11) if ordered else None
    work = Slice(11, 4, 3, 0, 3, order, view=view)
    on_device = DeviceLatents.copied(source, CPU, nullcontext)
    parts = copies(FileFeed(source, y, CPU, nullcontext, 2).parts(work))
    assert_same(parts, copies(DeviceFeed(on_device, torch.arange(11) * 7).parts(work)))
    samples = np.arange(11) if order is None else order
    rows = RowFormat((3,)).decode(on_device.tensors["x"])[torch.from_numpy(samples + 11 * view)]
    assert torch.equal(torch.cat([part[1]["x"] for part in parts]), rows)
    assert torch.cat([part[2] for part in parts]).tolist() == (samples * 7).tolist()
    assert [work.samples(start, stop).tolist() for _, start, stop in work.steps()] == [
        samples[first : first + 4].tolist() for first in (0, 4, 8)
    ]
    source.free()
    y.delete()


def test_latents_in_step_order_have_one_view(tmp_path: Path) -> None:
    source, y = latents(tmp_path, 11, step_order=True), labels(tmp_path, 11)
    order = np.random.default_rng(0).permutation(11)
    found = [
        copies(FileFeed(source, y, CPU, nullcontext, 0).parts(Slice(11, 4, 3, 0, 3, order, view=view)))
        for view in (0, 1)
    ]
    assert_same(*found)
    source.free()
    y.delete()


def test_without_labels_all_are_zero(tmp_path: Path) -> None:
    source = latents(tmp_path, 5)
    parts = copies(FileFeed(source, None, CPU, nullcontext, 2).parts(Slice(5, 2, 2, 0, 3)))
    assert torch.cat([part[2] for part in parts]).tolist() == [0] * 5
    source.free()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_leaving_early_ends_the_thread(depth: int, taken: int, tmp_path: Path) -> None:
    source, y = latents(tmp_path, 60), labels(tmp_path, 60)
    feed = FileFeed(source, y, CPU, nullcontext, depth)

    def leave() -> int:
        parts = feed.parts(Slice(60, 4, 2, 0, 15, phases=2))
        got = len(list(itertools.islice(parts, taken)))
        parts.close()  # type: ignore[attr-defined]
        return got

    assert within(10, leave) == taken
    assert threads() == []
    assert len(within(10, lambda: copies(feed.parts(Slice(60, 4, 4, 0, 15))))) == 15  # and it goes on working
    source.free()
    y.delete()


@pytest.mark.parametrize("depth", [0, 2])
def test_a_file_that_was_cut_is_an_error_where_the_parts_are_used(depth: int, tmp_path: Path) -> None:
    source, y = latents(tmp_path, 60), labels(tmp_path, 60)
    with source.files["x"].path.open("r+b") as file:
        file.truncate(100)
    feed: Feed = FileFeed(source, y, CPU, nullcontext, depth)

    def use() -> str:
        with pytest.raises(StorageError) as caught:
            list(feed.parts(Slice(60, 4, 4, 0, 15)))
        return str(caught.value)

    assert "ends at byte 100" in within(10, use)
    assert threads() == []
    source.free()
    y.delete()


def test_a_batch_size_far_beyond_the_rows_takes_no_more_memory_than_the_rows(tmp_path: Path) -> None:
    source, y = latents(tmp_path, 5), labels(tmp_path, 5)
    work = Slice(5, 10**13, 5, 0, 1)
    parts = copies(FileFeed(source, y, CPU, nullcontext, 0).parts(work))
    assert [part[0][3] for part in parts] == [5]
    source.free()
    y.delete()


def test_host_buffers_are_made_in_the_host_scope(tmp_path: Path) -> None:
    from edgetrain.memory.meter import LiveMeter

    source, y = latents(tmp_path, 8), labels(tmp_path, 8)
    meter = LiveMeter(full=True)
    with meter.watch():
        for part in FileFeed(source, y, CPU, meter.host, 2).parts(Slice(8, 8, 2, 0, 1)):
            assert part.size == 8
        del part
    slot = 2 * (3 + 4) * 4 + 2 * 8
    assert meter.cell_peak == slot  # float32 and labels are views of the slot
    source.free()
    y.delete()


def test_slots_filled_ahead_give_the_same_parts() -> None:
    formats = {"x": RowFormat((3,), "float32"), "y": RowFormat((), "int64")}
    work = Slice(rows=25, batch_size=10, micro_batch=4, first=0, last=3, phases=2)

    def batches() -> Iterator[HostBatch]:
        for step, start, stop in work.steps():
            x = torch.arange(start * 3, stop * 3, dtype=torch.float32).view(-1, 3)
            y = torch.arange(start, stop)
            buffers = {"x": formats["x"].encode(x), "y": formats["y"].encode(y)}
            yield HostBatch(step, start, stop - start, buffers)

    found = []
    for slots in (1, 2):
        released: list[int] = []
        transfer = Transfer(formats, torch.device("cpu"), work.micro_batch, slots)
        parts = transfer.parts(work, batches(), lambda batch, released=released: released.append(batch.step))
        found.append(
            [(p.step, p.phase, p.first, p.last, p.closes, p.streams["x"].tolist(), p.y.tolist()) for p in parts]
        )
        assert released == [0, 1, 2]
    assert found[0] == found[1]
