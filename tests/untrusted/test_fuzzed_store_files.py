"""Untrusted run folders: tensors, journals and rates are read right, or refused in one line that names the file.

``pytest tests/untrusted/test_fuzzed_store_files.py``; ``EDGETRAIN_EXAMPLES=1000`` tries more.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_attacks import MIB, NUMBERS, damaged, fuzzing, odd_values, ours, refused
from msgspec import ValidationError, convert

from edgetrain.errors import CorruptError
from edgetrain.memory import rates
from edgetrain.store.entries import FORMAT, Entry, FileEntry
from edgetrain.store.journal import Journal, _check, _line
from edgetrain.store.run import RunFolder
from edgetrain.store.tensors import join, read_header, read_metadata, read_tensors, write_tensors

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.bfloat16), "n": torch.tensor(7)}
CPU = torch.device("cpu")


def joined(path: Path) -> dict[str, torch.Tensor]:
    target = path.with_name("model")
    join(target, [("x.", path)], {})
    return read_tensors(target)


def every_reader(path: Path) -> list[Any]:
    """What each reader makes of a file; ``None`` where it refuses it."""
    readers: list[Callable[[Path], Any]] = [read_tensors, read_header, read_metadata, joined]
    return [ours(partial(read, path), str(path.parent)) for read in readers]


def equal(found: dict[str, torch.Tensor], prefix: str = "") -> bool:
    return found.keys() == {prefix + name for name in TENSORS} and all(
        torch.equal(found[prefix + name], value) for name, value in TENSORS.items()
    )


# --- safetensors --------------------------------------------------------------------------------


@fuzzing(300)
@given(data=st.data())
def test_damaged_tensor_files(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = write_tensors(path, TENSORS, {"unit": "000"})
    whole = path.read_bytes()
    found = data.draw(damaged(whole))
    path.write_bytes(found)
    tensors, _, metadata, model = every_reader(path)
    assert (model is None) == (tensors is None)
    verified = ours(lambda: read_tensors(path, entry), str(path))
    assert (verified is not None) == (found == whole)
    if verified is not None:
        assert equal(tensors)
        assert equal(model, "x.")
        assert metadata == {"unit": "000"}


sides = st.sampled_from([0, 1, 2, 3, *NUMBERS])
infos = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "I64", "F8_E4M3", "F4", "E8M0", "C64", "U16", "U64", "", "X"])
        | odd_values,
        "shape": st.lists(sides, max_size=4) | odd_values,
        "data_offsets": st.sampled_from([[0, 0], [0, 4], [0, 8], [4, 8], [8, 4], [-4, 4], [0, 1 << 63]])
        | st.lists(sides, max_size=3)
        | odd_values,
    }
)
header_values = st.dictionaries(
    st.sampled_from(["w", "b", "", "\ud800", "\n", "__metadata__"]) | st.text(max_size=4),
    infos | odd_values | st.just({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
    max_size=3,
)


def dumped(value: Any) -> bytes:
    """As JSON; numbers beyond what Python prints are left out."""
    try:
        return json.dumps(value).encode()
    except ValueError:
        return b"{}"


@fuzzing(300)
@given(header=header_values, body=st.sampled_from([0, 4, 8, 16]), by=st.sampled_from([0, 0, 0, 1, -1, 8, 1 << 40]))
def test_headers_of_any_content(header: dict[str, Any], body: int, by: int, tmp_path: Path) -> None:
    text = dumped(header)
    length = max(0, len(text) + by)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text + bytes(body))
    tensors, _, _, model = every_reader(path)
    assert (model is None) == (tensors is None)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "U8", "I64", "BOOL", "U16", "F8_E4M3", "C64", "F64"])
@pytest.mark.parametrize(
    "shape", [[0], [0, 1 << 40], [1 << 62, 0], [0, (1 << 64) - 1], [1 << 32, 1 << 32, 0], [0] * 70]
)
def test_tensors_without_elements_of_any_shape(dtype: str, shape: list[int], tmp_path: Path) -> None:
    text = dumped({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}})
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    every_reader(path)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, (100 << 20) + 1, 100 << 20, 9])
def test_a_header_that_claims_any_length_is_refused_unread(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}      ")
    for reader in (read_tensors, read_header, read_metadata, joined):
        refused(partial(reader, path), CorruptError, str(path), MIB)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"w": ' + "[" * 5000 + "]" * 5000 + "}", "9" * 5000]
)
def test_a_header_nested_without_end_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    for reader in (read_tensors, read_header, read_metadata, joined):
        refused(partial(reader, path), CorruptError, str(path), 32 * MIB)


def test_metadata_nested_without_end_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"edgetrain": "[" * 100_000}})
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    refused(lambda: read_metadata(path), CorruptError, "holds no edgetrain metadata", 32 * MIB)


# --- journal ------------------------------------------------------------------------------------


def line(entry: Any) -> bytes:
    """A line whose check is right, whatever the entry."""
    content = dumped(entry)
    return b'{"check": "%s", "entry": %s}\n' % (_check(content), content)


def checkpoint(number: int) -> dict[str, Any]:
    file = {"name": f"000@{number}.safetensors", "checksum": "ab" * 16, "size": 100}
    return {"type": "checkpoint", "number": number, "files": {"000": {"weights": file}}}


BEGIN = {"type": "begin", "format": FORMAT, "config": "", "net": []}


@fuzzing(300)
@given(data=st.data(), count=st.integers(1, 4))
def test_damaged_journals(data: st.DataObject, count: int, tmp_path: Path) -> None:
    written = [BEGIN, *(checkpoint(number) for number in range(count))]
    whole = b"".join(line(entry) for entry in written)
    journal = Journal(tmp_path / "j")
    journal.path.write_bytes(whole)
    expected = list(journal.entries())
    found = data.draw(damaged(whole, 2))
    journal.path.write_bytes(found)
    entries = ours(lambda: list(journal.entries()), str(journal.path))
    assert entries is None or all(entry in expected for entry in entries)
    assert found != whole or entries == expected


@fuzzing(200)
@given(values=st.lists(odd_values, max_size=3))
def test_lines_of_any_json(values: list[Any], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.path.write_bytes(b"".join(dumped(value) + b"\n" for value in values))
    assert not ours(lambda: list(journal.entries()), str(journal.path))


FILES = st.dictionaries(
    st.sampled_from(["000", "../x", "/x", ""]),
    odd_values
    | st.dictionaries(
        st.sampled_from(["weights", "optim", "../x"]),
        odd_values
        | st.fixed_dictionaries(
            {
                "name": odd_values | st.sampled_from(["../../x", "/etc/passwd", "a/b", "..", "", "\0", "a"]),
                "checksum": odd_values | st.just("ab"),
                "size": odd_values | st.just(1),
            }
        ),
        max_size=2,
    ),
    max_size=2,
)


@fuzzing(200)
@given(files=FILES | odd_values)
def test_a_checkpoint_names_only_files_of_its_folder(files: Any, tmp_path: Path) -> None:
    try:
        content = line(BEGIN) + line({"type": "checkpoint", "number": 1, "files": files})
    except ValueError:
        return
    folder = RunFolder(tmp_path)
    folder.journal.path.write_bytes(content)
    found = ours(folder.files, str(folder.journal.path))
    for kinds in (found or {}).values():
        for file in kinds.values():
            assert folder.units.path_of(file).parent == tmp_path / "cells"
            assert file.size >= 0


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".", "..", "a\0", 3, None, ["a"]])
def test_a_name_that_leads_out_of_the_folder_is_none(name: Any) -> None:
    with pytest.raises(ValidationError):
        convert({"name": name, "checksum": "ab", "size": 1}, FileEntry)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"entry":' * 100_000, b'{"check": "", "entry": ' + b"9" * 5000 + b"}"]
)
def test_a_line_nested_without_end_is_damaged(text: bytes, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.path.write_bytes(line(BEGIN) + text + b"\n" + line(checkpoint(2)))
    refused(lambda: list(journal.entries()), CorruptError, f"{journal.path}: line 2 is damaged", 32 * MIB)


def test_an_entry_nested_without_end_is_damaged(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    deep = b'{"check": "00", "entry": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}\n"
    journal.path.write_bytes(deep)
    refused(lambda: list(journal.entries()), CorruptError, "line 1 is damaged", 32 * MIB)


ENTRIES = st.fixed_dictionaries(
    {"type": st.sampled_from(["begin", "configure", "edit", "results", "checkpoint", "x"]) | odd_values},
    optional={
        name: odd_values | st.dictionaries(st.sampled_from(["1", "visit", "rows", "streams", "loss"]), odd_values)
        for name in ("number", "files", "visits", "within", "cells", "latents", "totals", "data", "config", "net")
    },
)


@fuzzing(300)
@given(entry=ENTRIES)
def test_entries_of_any_content_are_read_or_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    try:
        content = line(BEGIN) + line(entry)
    except ValueError:
        return
    journal = Journal(tmp_path / "j")
    journal.path.write_bytes(content)
    found = ours(lambda: list(journal.entries()), str(journal.path))
    if found is not None:
        assert len(b"".join(map(_line, found))) > 0  # it can be written again


def test_a_journal_of_a_terabyte_of_nothing_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.path.write_bytes(line(BEGIN))
    os.truncate(journal.path, 1 << 40)
    refused(lambda: list(journal.entries()), CorruptError, "line 2 is damaged", 400 * MIB)


def test_a_torn_line_longer_than_what_is_read_at_once_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    begin, later = (convert(each, Entry) for each in (BEGIN, checkpoint(1)))
    journal.append(begin)
    with journal.path.open("ab") as file:
        file.write(b"x" * (3 * MIB))
    assert list(journal.entries()) == [begin]
    journal.append(later)
    assert list(journal.entries()) == [begin, later]


# --- kept rates ---------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "edgetrain" / "rates.json"
    path.parent.mkdir()
    return path


@fuzzing(200)
@given(
    values=st.dictionaries(st.sampled_from(["flops", "memory", "call_s", "bus", "disk_read", "disk_write"]), odd_values)
    | odd_values
)
def test_kept_rates_of_any_content_are_sound_or_none(values: Any, cache: Path) -> None:
    cache.write_bytes(dumped({rates._key(CPU): values}))
    found = rates.load(CPU)
    assert found is None or (found.flops > 0 and found.memory > 0 and found.call_s > 0)


def test_kept_rates_come_back(cache: Path) -> None:
    kept = rates.Rates(1e9, 1e9, 1e-6, None, 1e6, None)
    for content in (b"", b"[" * 100_000, b"{}", b"\xff"):
        cache.write_bytes(content)
        assert rates.load(CPU) is None
        rates.save(kept, CPU)
        assert rates.load(CPU) == kept
