"""Batches on their way to the device, from files and from the device. ``pytest tests/stream/test_reader.py``."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import labels_on_device

from edgetrain.errors import StorageError
from edgetrain.memory.meter import LiveMeter
from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import LATENT_DTYPES, RowFormat
from edgetrain.stream.draws import StepDraws
from edgetrain.stream.latents import DeviceLatents, FileLatents
from edgetrain.stream.reader import LABELS, LABELS_ONLY, LabelFile, Reader
from edgetrain.stream.span import Span

CPU = torch.device("cpu")
fuzzing = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
#: What a micro-batch shows: step, start and size of its batch, its rows, streams and labels.
Seen = tuple[tuple[int, int, int, int, int], dict[str, torch.Tensor], torch.Tensor]


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
def spans(draw: st.DrawFn) -> Span:
    rows = draw(st.integers(1, 40))
    batch = draw(st.integers(1, 45))
    steps = -(-rows // batch)
    first = draw(st.integers(0, steps - 1))
    order = draw(st.none() | st.permutations(range(rows)))
    return Span(
        rows,
        batch,
        draw(st.integers(1, batch)),
        first,
        draw(st.integers(first + 1, steps)),
        None if order is None else np.array(order, np.int64),
    )


def latents(folder: Path, rows: int, dtype: str = "float32", step_order: bool = False, name: str = "1") -> FileLatents:
    """Two streams of random latents in files."""
    source = torch.Generator().manual_seed(rows + int(name))
    made = FileLatents(folder, name, rows, dtype, step_order, nullcontext, lambda size: None, lambda size: None)
    sink = made.sink()
    sink.put(0, {"x": torch.randn(rows, 3, generator=source), "neg": torch.randn(rows, 2, 2, generator=source)})
    sink.close()
    return made


@contextmanager
def stored(folder: Path, rows: int, *more: Any) -> Iterator[tuple[FileLatents, LabelFile]]:
    """Latents and labels in files, for as long as they are needed."""
    source, y = latents(folder, rows, *more), LatentFile(folder / "y.rows", rows, LABELS).allocate()
    y.write(0, LABELS.encode(torch.arange(rows) * 7))
    try:
        yield source, LabelFile(y)
    finally:
        source.free()
        y.delete()


def draws(step: int, samples: Any) -> StepDraws:
    return StepDraws(0, 0, 0, step, samples)


def seen(reader: Reader, span: Span, reads: Sequence[int] = (0,), hint: Sequence[int] | None = None) -> list[Seen]:
    """What is read if every step reads its sources in the order ``reads``; a micro-batch is valid until the next."""
    found: list[Seen] = []
    with reader.batches(span, reads if hint is None else hint, draws) as batches:
        for batch in batches:
            for source in reads:
                for micro in batch.micro_batches(source):
                    shown = micro.read()
                    assert micro.start == batch.start + micro.first
                    where = (batch.step, batch.start, batch.size, micro.first, micro.last)
                    copies = {name: value.clone() for name, value in shown.streams.items()}
                    found.append((where, copies, shown.y.clone()))
    return found


def assert_same(left: list[Seen], right: list[Seen]) -> None:
    assert [each[0] for each in left] == [each[0] for each in right]
    for one, other in zip(left, right, strict=True):
        assert one[1].keys() == other[1].keys()
        assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
        assert torch.equal(one[2], other[2])


@fuzzing
@given(
    span=spans(),
    dtype=st.sampled_from(LATENT_DTYPES),
    step_order=st.booleans(),
    ahead=st.integers(0, 3),
    slots=st.integers(1, 2),
)
def test_files_and_the_device_give_the_same_batches(
    span: Span, dtype: str, step_order: bool, ahead: int, slots: int, tmp_path: Path
) -> None:
    with stored(tmp_path, span.rows, dtype, step_order) as (source, y):
        reader = Reader([source.source()], y, CPU, read_ahead=ahead, slots=slots)
        from_files = within(20, lambda: seen(reader, span))
        on_device = DeviceLatents.copied(source, CPU, nullcontext).source()
        labels = labels_on_device(torch.arange(span.rows) * 7)
        assert_same(from_files, seen(Reader([on_device], labels, CPU), span))
    assert threads() == []


@fuzzing
@given(span=spans())
def test_micro_batches_cover_each_batch_in_order(span: Span, tmp_path: Path) -> None:
    with stored(tmp_path, span.rows) as (source, y):
        out = torch.empty(span.rows, 12, dtype=torch.uint8)
        source.files["x"].read(slice(0, span.rows), out)
        values = RowFormat((3,)).decode(out).clone()
        found = seen(Reader([source.source()], y, CPU), span, (0, 0))
    order = np.arange(span.rows) if span.order is None else span.order
    for step in range(span.first, span.last):
        start = step * span.batch_size
        stop = min(start + span.batch_size, span.rows)
        own = [each for each in found if each[0][0] == step]
        for once in (own[: len(own) // 2], own[len(own) // 2 :]):
            assert all(each[0][1:3] == (start, stop - start) for each in once)
            assert all(0 < each[0][4] - each[0][3] <= span.micro_batch for each in once)
            samples = torch.from_numpy(order[start:stop].copy())
            assert torch.equal(torch.cat([each[1]["x"] for each in once]), values[samples])
            assert torch.equal(torch.cat([each[2] for each in once]), samples * 7)


class ScriptedCell:
    """Reads sources in an order of its own, whatever it said before; leaves steps early."""

    def __init__(self, script: list[list[tuple[int, int]]]):
        self.script = script  # for each step: (source, micro-batches that are read of it)

    def run(self, reader: Reader, span: Span, hint: Sequence[int]) -> list[Seen]:
        found: list[Seen] = []
        with reader.batches(span, hint, draws) as batches:
            for batch in batches:
                for source, count in self.script[batch.step % len(self.script)]:
                    for micro in itertools.islice(batch.micro_batches(source), count):
                        shown = micro.read()
                        where = (batch.step, source, batch.size, micro.first, micro.last)
                        copies = {name: value.clone() for name, value in shown.streams.items()}
                        found.append((where, copies, shown.y.clone()))
        return found


SOURCES = st.integers(0, 2) | st.just(LABELS_ONLY)


@fuzzing
@given(
    span=spans(),
    script=st.lists(st.lists(st.tuples(SOURCES, st.integers(1, 9)), max_size=5), min_size=1, max_size=3),
    hint=st.lists(SOURCES, max_size=6),
    kinds=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    ahead=st.integers(0, 3),
    slots=st.integers(1, 2),
)
def test_whatever_a_cell_says_and_reads_the_values_are_the_same(
    span: Span,
    script: list[list[tuple[int, int]]],
    hint: list[int],
    kinds: tuple[bool, bool, bool],
    ahead: int,
    slots: int,
    tmp_path: Path,
) -> None:
    files = [latents(tmp_path, span.rows, name=str(number)) for number in range(3)]
    with stored(tmp_path, span.rows, "float32", False, "9") as (_, y):
        sources = [
            file.source() if kind else DeviceLatents.copied(file, CPU, nullcontext).source()
            for file, kind in zip(files, kinds, strict=True)
        ]
        reader, cell = Reader(sources, y, CPU, read_ahead=ahead, slots=slots), ScriptedCell(script)
        found = within(20, lambda: cell.run(reader, span, hint))
        plain = []
        for (step, source, size, first, last), _, _ in found:
            start = step * span.batch_size
            rows = np.arange(span.rows) if span.order is None else span.order
            picked = torch.from_numpy(rows[start : start + size][first:last].copy())
            streams: dict[str, torch.Tensor] = {}
            if source != LABELS_ONLY:
                for name, file in files[source].files.items():
                    out = torch.empty(span.rows, file.format.row_bytes, dtype=torch.uint8)
                    file.read(slice(0, span.rows), out)
                    streams[name] = file.format.decode(out)[picked]
            plain.append(((step, source, size, first, last), streams, picked * 7))
        for file in files:
            file.free()
    assert_same(found, plain)
    assert threads() == []


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("view", [0, 1, 2])
def test_views_follow_each_other_and_share_their_labels(view: int, ordered: bool, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(11) if ordered else None
    span = Span(11, 4, 3, 0, 3, order, view=view)
    with stored(tmp_path, 3 * 11) as (source, _):
        on_device = DeviceLatents.copied(source, CPU, nullcontext)
        y = LatentFile(tmp_path / "labels.rows", 11, LABELS).allocate()
        y.write(0, LABELS.encode(torch.arange(11) * 7))
        found = seen(Reader([source.source()], LabelFile(y), CPU), span)
        assert_same(found, seen(Reader([on_device.source()], labels_on_device(torch.arange(11) * 7), CPU), span))
        samples = np.arange(11) if order is None else order
        rows = RowFormat((3,)).decode(on_device.tensors["x"])[torch.from_numpy(samples + 11 * view)]
        assert torch.equal(torch.cat([each[1]["x"] for each in found]), rows)
        assert torch.cat([each[2] for each in found]).tolist() == (samples * 7).tolist()
        assert [span.samples(*span.bounds(step)).tolist() for step in range(3)] == [
            samples[first : first + 4].tolist() for first in (0, 4, 8)
        ]
        y.delete()


def test_latents_in_step_order_have_one_view(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(11)
    with stored(tmp_path, 11, "float32", True) as (source, y):
        reader = Reader([source.source()], y, CPU, read_ahead=0)
        found = [seen(reader, Span(11, 4, 3, 0, 3, order, view=view)) for view in (0, 1)]
    assert_same(*found)


def test_only_the_streams_that_are_asked_for_are_read(tmp_path: Path) -> None:
    with stored(tmp_path, 5) as (source, y):
        source.files["x"].path.unlink()
        found = seen(Reader([source.source(["neg"])], y, CPU), Span(5, 2, 2, 0, 3))
    assert all(each[1].keys() == {"neg"} for each in found)


def test_without_labels_all_are_zero(tmp_path: Path) -> None:
    with stored(tmp_path, 5) as (source, _):
        found = seen(Reader([source.source()], LabelFile(None), CPU), Span(5, 2, 2, 0, 3))
    assert torch.cat([each[2] for each in found]).tolist() == [0] * 5


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 5])
@pytest.mark.parametrize("fails", [False, True])
def test_leaving_early_ends_the_thread(ahead: int, taken: int, fails: bool, tmp_path: Path) -> None:
    with stored(tmp_path, 60) as (source, y):
        reader = Reader([source.source()], y, CPU, read_ahead=ahead)

        def leave() -> int:
            got = 0
            with (
                pytest.raises(ZeroDivisionError) if fails else nullcontext(),
                reader.batches(Span(60, 4, 2, 0, 15), (0, 0), draws) as batches,
            ):
                for batch in itertools.islice(batches, taken):
                    next(batch.micro_batches())
                    got += 1
                if fails:
                    got = got // 0
            return got

        assert within(10, leave) == taken
        assert threads() == []
        assert len(within(10, lambda: seen(reader, Span(60, 4, 4, 0, 15)))) == 15  # and it can be used again


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_file_that_was_cut_is_an_error_where_its_rows_are_used(ahead: int, tmp_path: Path) -> None:
    with stored(tmp_path, 60) as (source, y):
        with source.files["x"].path.open("r+b") as file:
            file.truncate(100)

        def use() -> str:
            with pytest.raises(StorageError) as caught:
                seen(Reader([source.source()], y, CPU, read_ahead=ahead), Span(60, 4, 4, 0, 15))
            return str(caught.value)

        assert "ends at byte 100" in within(10, use)
        assert threads() == []


def test_a_batch_size_far_beyond_the_rows_takes_no_more_memory_than_the_rows(tmp_path: Path) -> None:
    with stored(tmp_path, 5) as (source, y):
        found = seen(Reader([source.source()], y, CPU, read_ahead=0), Span(5, 10**13, 5, 0, 1))
    assert [each[0][2] for each in found] == [5]


@pytest.mark.parametrize("slots", [1, 2])
def test_host_buffers_are_made_in_the_host_scope(slots: int, tmp_path: Path) -> None:
    meter = LiveMeter(full=True)
    with stored(tmp_path, 8) as (source, y):
        reader = Reader([source.source()], y, CPU, meter.host, 2, slots=slots)
        with meter.watch(), reader.batches(Span(8, 8, 2, 0, 1), (0,), draws) as batches:
            for batch in batches:
                for micro in batch.micro_batches():
                    micro.read()
    slot = 2 * (3 + 4) * 4 + 2 * 8
    assert meter.cell_peak == slots * slot  # float32 and labels are views of a slot


@pytest.mark.parametrize("ahead", [0, 2])
def test_nothing_keeps_a_source_alive_when_reading_has_ended(ahead: int, tmp_path: Path) -> None:
    """Not even a cycle that the garbage collector would find: resident latents are freed by the next visit."""
    with stored(tmp_path, 9) as (source, y):
        gc.collect()
        gc.disable()
        try:
            reads = source.source()
            held = weakref.ref(reads)
            reader = Reader([reads], y, CPU, read_ahead=ahead)
            seen(reader, Span(9, 4, 2, 0, 3))
            del reads, reader
            assert held() is None
        finally:
            gc.enable()


def test_what_a_first_cell_reads_is_made_of_each_micro_batch_with_its_own_draws(tmp_path: Path) -> None:
    whole = draws(0, np.arange(8)).normal("noise", torch.zeros(8, 3))
    with stored(tmp_path, 8) as (source, y):

        def prepare(streams: Any, labels: torch.Tensor, own: Any) -> Any:
            return {"noise": own.normal("noise", streams["x"]) + labels[:, None]}

        found = seen(Reader([source.source()], y, CPU, prepare=prepare), Span(8, 8, 3, 0, 1))
    made = torch.cat([each[1]["noise"] for each in found])
    assert torch.equal(made, whole + (torch.arange(8) * 7)[:, None])
