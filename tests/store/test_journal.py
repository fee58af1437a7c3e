"""What is not in the journal did not happen. ``pytest tests/store/test_journal.py``."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetrain.errors import CorruptError, StorageError
from edgetrain.store import journal as module
from edgetrain.store.journal import Journal

fuzzing = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.dictionaries(st.text(max_size=5), values, max_size=3)


def commit(number: int) -> dict[str, Any]:
    """An entry as the run folder writes it: it ends in nested braces."""
    file = {"name": f"000@{number}.safetensors", "checksum": "ab" * 16, "size": 100}
    return {"commit": number, "files": {"000": {"weights": file}}}


def journal(path: Path, *given_entries: dict[str, Any]) -> Journal:
    path.unlink(missing_ok=True)
    made = Journal(path)
    for entry in given_entries:
        made.append(entry)
    return made


def test_no_journal_has_no_entries(tmp_path: Path) -> None:
    assert list(Journal(tmp_path / "j").entries()) == []


@fuzzing
@given(given_entries=st.lists(entries, max_size=4))
def test_entries_come_back_in_the_order_in_which_they_were_written(
    given_entries: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert list(journal(tmp_path / "j", *given_entries).entries()) == given_entries


@fuzzing
@given(cut=st.integers(0, 10_000))
def test_a_journal_cut_anywhere_holds_all_lines_before_the_cut(cut: int, tmp_path: Path) -> None:
    written = journal(tmp_path / "j", *map(commit, (1, 2, 3)))
    content = written.path.read_bytes()
    cut %= len(content) + 1
    written.path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    found = list(written.entries())
    assert found in ([commit(n + 1) for n in range(whole)], [commit(n + 1) for n in range(whole + 1)])


def cuts_of_last_line() -> list[Any]:
    """Bytes left of a last line: few, in the middle, and all of its end, which is braces."""
    return [1, 2, 10, 60, *range(-12, 0)]


@pytest.mark.parametrize("left", cuts_of_last_line())
def test_appending_after_a_torn_line_works(left: int, tmp_path: Path) -> None:
    written = journal(tmp_path / "j", commit(1), commit(2))
    content = written.path.read_bytes()
    start = content.index(b"\n") + 1
    written.path.write_bytes(content[:start] + content[start:][:left])
    survived = list(written.entries())
    assert survived in ([commit(1)], [commit(1), commit(2)])
    written.append(commit(3))
    assert list(written.entries()) == [*survived, commit(3)]
    written.append(commit(4))
    assert list(written.entries()) == [*survived, commit(3), commit(4)]


def test_a_journal_torn_twice_keeps_what_was_whole(tmp_path: Path) -> None:
    written = journal(tmp_path / "j", commit(1))
    for number in (2, 3):
        whole = written.path.read_bytes()
        written.append(commit(number))
        written.path.write_bytes(written.path.read_bytes()[: len(whole) + 20])
        assert list(written.entries()) == [commit(1)]
    written.append(commit(4))
    assert list(written.entries()) == [commit(1), commit(4)]


@fuzzing
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_middle_is_found_or_harmless(at: int, bit: int, tmp_path: Path) -> None:
    expected = [commit(number) for number in (1, 2, 3, 4)]
    written = journal(tmp_path / "j", *expected)
    content = bytearray(written.path.read_bytes())
    ends = [index for index, byte in enumerate(content) if byte == ord("\n")]
    at = ends[0] + 1 + at % (ends[1] - 1 - ends[0] - 1)  # in line 2, before its last brace
    content[at] ^= 1 << bit
    written.path.write_bytes(content)
    try:
        assert list(written.entries()) == expected  # the flip hit a blank between JSON's tokens
    except CorruptError as error:
        assert str(written.path) in str(error)
        assert "line 2" in str(error) or "line 3" in str(error)


def test_damage_to_the_last_brace_of_a_middle_line_is_found(tmp_path: Path) -> None:
    written = journal(tmp_path / "j", commit(1), commit(2), commit(3))
    lines = written.path.read_bytes().split(b"\n")
    lines[1] = lines[1][:-1] + b"|"
    written.path.write_bytes(b"\n".join(lines))
    with pytest.raises(CorruptError, match="line 2 is damaged"):
        list(written.entries())


def test_two_damaged_lines_at_the_end_are_found(tmp_path: Path) -> None:
    written = journal(tmp_path / "j", commit(1), commit(2), commit(3))
    content = written.path.read_bytes()
    content = content.replace(b'"commit": 2', b'"commit": 7').replace(b'"commit": 3', b'"commit": 8')
    written.path.write_bytes(content)
    with pytest.raises(CorruptError):
        list(written.entries())


@fuzzing
@given(content=st.binary(max_size=60))
def test_any_bytes_give_no_entry_of_ours(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    try:
        assert list(Journal(path).entries()) == []
    except CorruptError as error:
        assert str(path) in str(error)


def test_a_line_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], os.fsync

    def note(descriptor: int) -> None:
        seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, (tmp_path / "j").stat().st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    Journal(tmp_path / "j").append({"a": 1})
    size = (tmp_path / "j").stat().st_size
    assert seen == [("j", size), (tmp_path.name, size)]  # a new file's name is made durable too


def test_a_refusing_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = journal(tmp_path / "j", commit(1))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="j: no space left on device"):
        written.append(commit(2))


def test_an_append_after_a_failed_one_keeps_the_journal_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = journal(tmp_path / "j", commit(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(StorageError):
            written.append(commit(2))
    written.append(commit(3))
    assert list(written.entries())[-1] == commit(3)
    assert next(written.entries()) == commit(1)


def test_a_journal_that_grows_is_replaced_by_what_readers_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLACK", 300)
    compact, whole = Journal(tmp_path / "a"), []
    for number in range(1, 60):
        entry = commit(number)
        if number % 20 == 1:
            entry |= {"edit": f"edit {number}", "config": f"seed = {number}", "requested": {"tiles": number}}
        for each in [entry, {"config": f"seed = {number}"}] if number % 7 == 0 else [entry]:
            compact.append(each)
            whole.append(each)
            assert compact.last() == {
                name: value for name, value in entry.items()
                if name in compact.last() or name not in ("edit", "config", "requested")
            }  # fmt: skip
            known = Journal(tmp_path / "a")
            assert known.config() == [one["config"] for one in whole if "config" in one][-1]
            assert known.requested() == [one["requested"] for one in whole if "requested" in one][-1]
            edits = [one["edit"] for one in known.entries() if "edit" in one]
            assert edits == [one["edit"] for one in whole if "edit" in one]
    results = {"model": {"name": "model.safetensors", "checksum": "ab", "size": 3}}
    compact.append({"results": results})
    assert Journal(tmp_path / "a").results()["model"].size == 3
    assert (tmp_path / "a").stat().st_size < 3000
    compact.append(commit(99))
    assert Journal(tmp_path / "a").results() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_journal_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    known = journal(tmp_path / "j", *map(commit, range(1, 30)))
    before = (tmp_path / "j").read_bytes()
    monkeypatch.setattr(module, "SLACK", 0)

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if operation == "replace" else os, operation, refuse)
    with pytest.raises(StorageError):
        known.append(commit(30))
    assert (tmp_path / "j").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["j"]
