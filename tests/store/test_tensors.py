"""Tensors on disk: atomic, durable, checksummed. ``pytest tests/store/test_tensors.py``."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edgetrain.errors import CorruptError, EdgetrainError, StorageError
from edgetrain.store import tensors as module
from edgetrain.store.entries import FileEntry
from edgetrain.store.tensors import join, read_header, read_metadata, read_tensors, write_tensors

fuzzing = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def some(seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {
        "cell.linear.weight": torch.randn(3, 4, generator=source),
        "head.weight": torch.randn(2, 3, generator=source).to(torch.bfloat16),
        "optim.step.cell.linear.weight.step": torch.tensor(7.0),
        "counts": torch.tensor([1, -(2**62)]),
    }


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@fuzzing
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_tensors_come_back_as_they_were(
    shapes: list[list[int]], dtypes: list[torch.dtype], seed: int, tmp_path: Path
) -> None:
    source = torch.Generator().manual_seed(seed)
    given_tensors = {
        f"t.{number}": torch.randint(0, 100, shape, generator=source).to(dtype)
        for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    entry = write_tensors(tmp_path / "a.safetensors", given_tensors, {"unit": "000", "n": seed})
    assert equal(read_tensors(tmp_path / "a.safetensors", entry), given_tensors)
    assert read_metadata(tmp_path / "a.safetensors") == {"unit": "000", "n": seed}
    assert entry.name == "a.safetensors"
    assert entry.size == (tmp_path / "a.safetensors").stat().st_size


def test_equal_content_gives_an_equal_checksum(tmp_path: Path) -> None:
    first = write_tensors(tmp_path / "a", some(), {"x": 1, "y": 2})
    second = write_tensors(tmp_path / "b", some(), {"y": 2, "x": 1})
    assert first.checksum == second.checksum
    assert first.checksum != write_tensors(tmp_path / "c", some(1), {"x": 1, "y": 2}).checksum


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    entry = write_tensors(path, {"w": torch.arange(6.0)}, {"unit": "000"})
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(CorruptError, match=f"expected {entry.checksum}"):
            read_tensors(path, entry)
    path.write_bytes(content)
    assert torch.equal(read_tensors(path, entry)["w"], torch.arange(6.0))


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 60, -1])
def test_a_file_cut_short_is_corrupt_even_without_a_checksum(left: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tensors(path, some(), {})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CorruptError, match=f"{path}: not a whole safetensors file"):
        read_tensors(path)


@fuzzing
@given(content=st.binary(max_size=80))
def test_any_bytes_are_an_error_of_ours(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    for reader in (read_tensors, read_metadata):
        with pytest.raises(CorruptError, match=str(path)):
            reader(path)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    for reader in (read_tensors, read_metadata, read_header):
        with pytest.raises(StorageError, match="gone: no such file"):
            reader(tmp_path / "gone")
    with pytest.raises(StorageError, match="gone: no such file"):
        read_tensors(tmp_path / "gone", FileEntry("gone", "ab", 1))


def test_a_header_that_claims_terabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", 1 << 42) + b"{}")
    with pytest.raises(CorruptError, match="no safetensors header"):
        read_header(path)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '"x"', "{", '{"__metadata__": []}', '{"__metadata__": {"edgetrain": "[]"}}', "{}"]
)
def test_a_header_that_is_not_ours_has_no_metadata(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(CorruptError, match=str(path)):
        read_metadata(path)


# --- atomicity --------------------------------------------------------------------------------


def refuse(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse_as_library(*arguments: Any, **named: Any) -> Any:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FAILURES = {
    "save_file (library)": (module, "save_file", refuse_as_library),
    "save_file (system)": (module, "save_file", refuse),
    "checksum": (module, "checksum", refuse),
    "fsync": (os, "fsync", refuse),
    "rename": (Path, "replace", refuse),
}


@pytest.mark.parametrize("step", FAILURES)
def test_a_failed_write_leaves_the_file_as_it_was(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    entry = write_tensors(path, some(), {"unit": "000"})
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[step])
        with pytest.raises(StorageError, match=": no space left on device$"):
            write_tensors(path, some(1), {"unit": "000"})
    assert equal(read_tensors(path, entry), some())
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("step", FAILURES)
def test_a_failed_first_write_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[step])
        with pytest.raises(StorageError):
            write_tensors(tmp_path / "a", some(), {})
    assert names(tmp_path) == []


def test_a_file_cut_while_it_was_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        os.truncate(path, 20)
        refuse()

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(StorageError):
        write_tensors(tmp_path / "a", some(), {})
    assert names(tmp_path) == []


# --- join -------------------------------------------------------------------------------------


@fuzzing
@given(
    parts=st.lists(
        st.dictionaries(
            st.sampled_from(["w", "b", "head.weight", "é"]),
            st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)),
            max_size=4,
        ),
        max_size=4,
    )
)
def test_a_joined_file_loads_with_the_library_alone_and_equals_its_parts(parts: list[dict], tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    expected, given_parts = {}, []
    for number, shapes in enumerate(parts):
        content = {
            name: torch.randint(0, 100, shape, generator=source).to(dtype) for name, (shape, dtype) in shapes.items()
        }
        write_tensors(tmp_path / f"part{number}", content, {"unit": number})
        given_parts.append((f"{number:03}.", tmp_path / f"part{number}"))
        expected |= {f"{number:03}.{name}": value for name, value in content.items()}
    entry = join(tmp_path / "model", given_parts, {"format": 1})
    assert equal(load_file(tmp_path / "model"), expected)
    assert equal(read_tensors(tmp_path / "model", entry), expected)
    assert read_metadata(tmp_path / "model") == {"format": 1}
    assert entry.size == (tmp_path / "model").stat().st_size


def test_a_join_crosses_the_bounds_of_chunks(tmp_path: Path) -> None:
    large = {"w": torch.from_numpy(np.random.default_rng(0).standard_normal(700_001).astype(np.float32))}
    write_tensors(tmp_path / "a", large, {})
    write_tensors(tmp_path / "b", some(), {})
    join(tmp_path / "model", [("a.", tmp_path / "a"), ("b.", tmp_path / "b")], {})
    found = load_file(tmp_path / "model")
    assert torch.equal(found.pop("a.w"), large["w"])
    assert equal({name.removeprefix("b."): value for name, value in found.items()}, some())


def test_parts_written_by_the_library_itself_are_joined_too(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a")
    join(tmp_path / "model", [("x.", tmp_path / "a")], {})
    assert torch.equal(load_file(tmp_path / "model")["x.w"], torch.ones(3))


@pytest.mark.parametrize("step", ["fsync", "rename", "checksum"])
def test_a_failed_join_leaves_the_model_as_it_was(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "a", some(), {})
    entry = join(tmp_path / "model", [("x.", tmp_path / "a")], {})
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[step])
        with pytest.raises(StorageError):
            join(tmp_path / "model", [("y.", tmp_path / "a")], {})
    assert set(read_tensors(tmp_path / "model", entry)) == {f"x.{name}" for name in some()}
    assert names(tmp_path) == ["a", "model"]


def test_a_join_with_a_missing_part_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone: no such file"):
        join(tmp_path / "model", [("x.", tmp_path / "gone")], {})
    assert names(tmp_path) == []


def test_a_join_with_a_part_that_was_cut_writes_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", some(), {})
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-1])
    with pytest.raises(CorruptError, match=str(tmp_path / "a")):
        join(tmp_path / "model", [("x.", tmp_path / "a")], {})
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("info", [{}, [], None, {"data_offsets": [0]}, {"data_offsets": ["a", "b"]}])
def test_a_join_with_a_part_whose_header_is_nonsense_is_corrupt(info: Any, tmp_path: Path) -> None:
    text = json.dumps({"w": info}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(EdgetrainError, match=str(tmp_path / "a")):
        join(tmp_path / "model", [("x.", tmp_path / "a")], {})
