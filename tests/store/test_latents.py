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

from edgetrain.errors import CorruptError, DamagedLatentsError, StorageError
from edgetrain.store.latents import LatentFile
from edgetrain.store.rows import RowFormat
from edgetrain.store.tensors import FileEntry

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
    """Rows, elements, window, and what is done: rows written behind the last, reads of runs, gathers, checkpoints."""
    rows, elements = draw(st.integers(1, 300)), draw(st.integers(1, 9000))
    steps: list = []
    written = 0
    for _ in range(draw(st.integers(1, 12))):
        kinds = ["write"] * (written < rows) + ["read", "gather", "distrust", "checkpoint", "restart"] * (written > 0)
        kind = draw(st.sampled_from(kinds))
        if kind == "write":
            last = draw(st.integers(written + 1, rows))
            steps.append((kind, (written, last)))
            written = last
        elif kind == "read":
            first = draw(st.integers(0, written - 1))
            steps.append((kind, (first, draw(st.integers(first + 1, written)))))
        elif kind == "gather":
            steps.append((kind, draw(st.lists(st.integers(0, written - 1), min_size=1, max_size=80))))
        else:
            steps.append((kind, None))
            written = 0 if kind == "restart" else written
    return rows, elements, draw(st.sampled_from([1, 100_000, 1 << 24])), steps


@fuzzing
@given(program=programs())
def test_a_latent_file_behaves_as_an_array(program: tuple[int, int, int, list], tmp_path: Path) -> None:
    rows, elements, window, steps = program
    layout, draws = RowFormat((elements,), "pixels"), np.random.default_rng(elements)
    model = np.zeros((rows, elements), np.uint8)  # freshly allocated space reads as zeros
    file = LatentFile(tmp_path / "x.rows", rows, layout, window).allocate()
    try:
        for number, (kind, where) in enumerate(steps):
            if kind == "write":
                values = draws.integers(0, 256, (where[1] - where[0], elements), np.uint8)
                assert file.write(where[0], torch.from_numpy(values)) == values.size
                model[where[0] : where[1]] = values
            elif kind == "read":
                assert np.array_equal(read(file, slice(*where)), model[slice(*where)])
            elif kind == "gather":
                assert np.array_equal(read(file, np.array(where)), model[where])
            elif kind == "distrust":
                file.distrust()
            elif kind == "restart":
                file.restart(tmp_path / "x.rows", 0)
            else:  # another process continues with what was saved
                sums, written, digest = file.save(number), file.written, file.digest()
                file.settle()
                file.close()
                file = LatentFile(tmp_path / "x.rows", rows, layout, window).reopen(written, sums)
                assert file.written == written
                assert file.digest() == digest
        assert (tmp_path / "x.rows").read_bytes() == model.tobytes()
    finally:
        file.delete()
    assert list(tmp_path.iterdir()) == []


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


def saved(path: Path, rows: int = 40, elements: int = 5) -> tuple[np.ndarray, FileEntry]:
    """A saved file's rows and its checksums' file."""
    file, model = filled(path, rows, elements)
    sums = file.save(1)
    file.close()
    return model, sums


def reopened(path: Path, sums: FileEntry, rows: int = 40, elements: int = 5) -> LatentFile:
    return LatentFile(path, rows, RowFormat((elements,), "pixels")).reopen(rows, sums)


def test_a_file_saved_is_found_again(tmp_path: Path) -> None:
    model, sums = saved(tmp_path / "x.rows")
    again = reopened(tmp_path / "x.rows", sums)
    assert np.array_equal(read(again, np.arange(40)[::-1].copy()), model[::-1])
    again.close()


def test_a_file_saved_in_part_goes_on_with_its_next_row(tmp_path: Path) -> None:
    layout, model = RowFormat((70_000,), "pixels"), np.random.default_rng(0).integers(0, 256, (11, 70_000), np.uint8)
    file = LatentFile(tmp_path / "x.rows", 11, layout).allocate()
    file.write(0, torch.from_numpy(model[:5]))
    sums = file.save(1)  # three rows are a block, so that one is begun
    file.write(5, torch.from_numpy(model[5:8]))  # lost: the process ends
    file.close()
    again = LatentFile(tmp_path / "x.rows", 11, layout).reopen(5, sums)
    again.write(5, torch.from_numpy(model[5:]))
    assert np.array_equal(read(again, np.arange(11)), model)
    assert again.digest() == filled_with(tmp_path / "whole.rows", model).digest()


def filled_with(path: Path, model: np.ndarray) -> LatentFile:
    file = LatentFile(path, len(model), RowFormat((model.shape[1],), "pixels")).allocate()
    file.write(0, torch.from_numpy(model))
    return file


@pytest.mark.parametrize("size", [0, 199, 201])
def test_a_file_of_another_size_is_corrupt(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.rows"
    _, sums = saved(path)
    path.write_bytes(bytes(size))
    with pytest.raises(CorruptError, match=rf"x\.rows: holds {size} bytes, expected 200"):
        reopened(path, sums)


def test_a_missing_file_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    _, sums = saved(tmp_path / "x.rows")
    (tmp_path / "x.rows").unlink()
    with pytest.raises(StorageError, match=r"x\.rows: no such file"):
        reopened(tmp_path / "x.rows", sums)


def test_damaged_checksums_are_named(tmp_path: Path) -> None:
    _, sums = saved(tmp_path / "x.rows")
    flip(tmp_path / sums.name, 3)
    with pytest.raises(CorruptError, match=r"x\.1\.sums: checksum .* the file is damaged"):
        reopened(tmp_path / "x.rows", sums)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize("at", [0, 99, 199])
def test_a_flipped_bit_is_found_when_a_file_is_taken_up_again(at: int, tmp_path: Path) -> None:
    _, sums = saved(tmp_path / "x.rows")
    flip(tmp_path / "x.rows", at)
    with pytest.raises(
        CorruptError, match=r"x\.rows: rows 0 to 39 are not as they were written.* newest checkpoint"
    ) as told:
        reopened(tmp_path / "x.rows", sums)
    assert type(told.value) is CorruptError


@pytest.mark.parametrize("window", [1, 1 << 24])
@pytest.mark.parametrize("rows", [slice(7, 8), np.array([7])])
def test_a_bit_that_flips_between_epochs_is_found_in_the_next(
    rows: slice | np.ndarray, window: int, tmp_path: Path
) -> None:
    file, model = filled(tmp_path / "x.rows", 12, 70_000, window)  # blocks of three rows
    for _ in range(2):
        assert np.array_equal(read(file, rows), model[rows])
    flip(tmp_path / "x.rows", 7 * 70_000)
    file.distrust()
    assert np.array_equal(read(file, slice(0, 6)), model[:6])
    with pytest.raises(DamagedLatentsError, match=r"x\.rows: rows 6 to 8 are not as they were written"):
        read(file, rows)
    file.close()


def test_rows_out_of_order_are_a_mistake(tmp_path: Path) -> None:
    file, _ = filled(tmp_path / "x.rows")
    with pytest.raises(ValueError, match="row 3 written after 40 rows from 0 on"):
        file.write(3, torch.zeros(1, 5, dtype=torch.uint8))
    file.close()


def test_reading_a_run_of_a_file_that_was_cut_is_a_storage_error(tmp_path: Path) -> None:
    file, _ = filled(tmp_path / "x.rows")
    os.truncate(tmp_path / "x.rows", 100)
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
    file = LatentFile(tmp_path / "x.rows", 40, RowFormat((5,), "pixels")).allocate()

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
        file.write(40, torch.zeros(1, 5, dtype=torch.uint8))


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
