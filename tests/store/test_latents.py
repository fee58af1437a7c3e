"""A file of rows against an array in memory. ``pytest tests/store/test_latents.py``."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetrain.errors import CorruptError, StorageError
from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import RowFormat

fuzzing = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def filled(path: Path, rows: int = 40, elements: int = 5, window: int = 16 << 20) -> tuple[LatentFile, np.ndarray]:
    """A file of random bytes and the same as an array."""
    layout = RowFormat((elements,), "pixels")
    model = np.random.default_rng(0).integers(0, 256, (rows, elements), np.uint8)
    file = LatentFile(path, rows, layout, window).allocate()
    file.write(0, torch.from_numpy(model.copy()))
    return file, model


def read(file: LatentFile, rows: slice | np.ndarray) -> np.ndarray:
    count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    out = torch.full((count, file.format.row_bytes), 77, dtype=torch.uint8)
    file.read(rows, out)
    return out.numpy()


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, int, int, list]:
    """Rows, elements, window, and what is done: writes of runs, reads of runs, gathers."""
    rows = draw(st.integers(1, 60))
    runs = st.tuples(st.integers(0, rows - 1), st.integers(1, rows)).map(
        lambda pair: (pair[0], min(rows, pair[0] + pair[1]))
    )
    steps = st.one_of(
        st.tuples(st.just("write"), runs, st.integers(0, 99)),
        st.tuples(st.just("read"), runs, st.just(0)),
        st.tuples(st.just("gather"), st.lists(st.integers(0, rows - 1), min_size=1, max_size=80), st.just(0)),
    )
    elements = draw(st.integers(1, 3000))
    window = draw(st.sampled_from([1, 100_000, 1 << 24]))
    return rows, elements, window, draw(st.lists(steps, min_size=1, max_size=12))


@fuzzing
@given(program=programs())
def test_a_latent_file_behaves_as_an_array(program: tuple[int, int, int, list], tmp_path: Path) -> None:
    rows, elements, window, steps = program
    model = np.zeros((rows, elements), np.uint8)  # freshly allocated space reads as zeros
    file = LatentFile(tmp_path / "x.rows", rows, RowFormat((elements,), "pixels"), window).allocate()
    try:
        for kind, where, seed in steps:
            if kind == "write":
                values = np.random.default_rng(seed).integers(0, 256, (where[1] - where[0], elements), np.uint8)
                assert file.write(where[0], torch.from_numpy(values)) == values.size
                model[where[0] : where[1]] = values
            elif kind == "read":
                assert np.array_equal(read(file, slice(*where)), model[slice(*where)])
            else:
                assert np.array_equal(read(file, np.array(where)), model[where])
    finally:
        file.close()
    assert (tmp_path / "x.rows").read_bytes() == model.tobytes()


def test_a_small_window_drops_pages_behind_the_reader(tmp_path: Path) -> None:
    def resident(path: Path) -> int:
        """KiB of the file that this process has mapped in."""
        lines = Path("/proc/self/smaps").read_text().splitlines()
        starts = [number for number, line in enumerate(lines) if line.endswith(str(path))]
        return sum(int(line.split()[1]) for at in starts for line in lines[at : at + 12] if line.startswith("Rss:"))

    order = np.random.default_rng(0).permutation(3000)
    mapped = {}
    for window in (1 << 18, 1 << 30):
        path = tmp_path / f"{window}.rows"
        file, model = filled(path, 3000, 4096, window)
        for part in np.split(order, 100):
            assert np.array_equal(read(file, part), model[part])
        mapped[window] = resident(path)
        file.close()
    assert mapped[1 << 30] > 8000
    assert mapped[1 << 18] < 3000  # one batch of 30 rows touches at most 30 * 68 KiB


def test_a_file_written_is_found_again(tmp_path: Path) -> None:
    file, model = filled(tmp_path / "x.rows")
    file.close()
    again = LatentFile(tmp_path / "x.rows", 40, RowFormat((5,), "pixels")).open()
    assert np.array_equal(read(again, np.arange(40)[::-1].copy()), model[::-1])
    again.close()


@pytest.mark.parametrize("size", [0, 199, 201])
def test_a_file_of_another_size_is_corrupt(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.rows"
    path.write_bytes(bytes(size))
    with pytest.raises(CorruptError, match=rf"x\.rows: holds {size} bytes, expected 200"):
        LatentFile(path, 40, RowFormat((5,), "pixels")).open()


def test_a_missing_file_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone\.rows: no such file"):
        LatentFile(tmp_path / "gone.rows", 1, RowFormat((5,))).open()


def test_reading_a_run_of_a_file_that_was_cut_is_a_storage_error(tmp_path: Path) -> None:
    file, model = filled(tmp_path / "x.rows")
    os.truncate(tmp_path / "x.rows", 100)
    assert np.array_equal(read(file, slice(0, 20)), model[:20])
    with pytest.raises(StorageError, match=r"x\.rows: ends at byte 100, expected 200"):
        read(file, slice(10, 30))
    file.close()


def test_gathering_from_a_file_that_was_cut_before_the_first_read_is_an_error_of_ours(tmp_path: Path) -> None:
    file, _ = filled(tmp_path / "x.rows")
    os.truncate(tmp_path / "x.rows", 100)
    with pytest.raises((StorageError, CorruptError), match=r"x\.rows"):
        read(file, np.array([1, 30]))
    file.close()


def test_a_full_disk_is_found_when_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"x\.rows: no space left on device"):
        LatentFile(tmp_path / "x.rows", 40, RowFormat((5,))).allocate()


def test_space_is_really_reserved(tmp_path: Path) -> None:
    file = LatentFile(tmp_path / "x.rows", 1000, RowFormat((256,))).allocate()
    found = (tmp_path / "x.rows").stat()
    assert found.st_size == file.size == 1_024_000
    assert found.st_blocks * 512 >= file.size
    file.close()


def test_a_failed_write_is_a_storage_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = filled(tmp_path / "x.rows")

    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(StorageError, match=r"x\.rows: input/output error"):
        file.write(0, torch.zeros(1, 5, dtype=torch.uint8))
    file.close()


def test_writes_and_reads_that_the_kernel_cuts_short_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:3]], at))
    file, model = filled(tmp_path / "x.rows")
    assert np.array_equal(read(file, slice(0, 40)), model)
    file.close()
    assert (tmp_path / "x.rows").read_bytes() == model.tobytes()


def test_a_file_that_cannot_be_created_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"x\.rows: no such file or directory"):
        LatentFile(tmp_path / "nowhere" / "x.rows", 1, RowFormat((5,))).allocate()


def test_closing_twice_is_harmless_and_reading_afterwards_is_an_error(tmp_path: Path) -> None:
    file, _ = filled(tmp_path / "x.rows")
    read(file, np.array([3]))
    file.close()
    file.close()
    for rows in (slice(0, 1), np.array([0])):
        with pytest.raises(StorageError, match=r"x\.rows: read or written after it was closed"):
            read(file, rows)
    with pytest.raises(StorageError, match="after it was closed"):
        file.write(0, torch.zeros(1, 5, dtype=torch.uint8))


def test_deleting_leaves_no_file_and_may_be_repeated(tmp_path: Path) -> None:
    file, _ = filled(tmp_path / "x.rows")
    read(file, np.array([3]))
    file.delete()
    file.delete()
    assert list(tmp_path.iterdir()) == []


def test_closing_gives_the_descriptor_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        file, _ = filled(tmp_path / f"{number}.rows")
        read(file, np.array([3]))
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before
