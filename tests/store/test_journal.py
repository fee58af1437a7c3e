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
from edgetrain.record import Sums
from edgetrain.store import journal as module
from edgetrain.store.entries import (
    FORMAT,
    Begin,
    Checkpoint,
    Configure,
    Edit,
    Entry,
    FileEntry,
    Fingerprint,
    Results,
    Totals,
    Within,
)  # fmt: skip
from edgetrain.store.journal import History, Journal

fuzzing = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
names = st.from_regex(r"[a-z0-9_][a-z0-9_@.-]{0,12}", fullmatch=True)
files = st.dictionaries(
    names, st.dictionaries(names, st.builds(FileEntry, names, st.text(max_size=8), st.integers(0, 99)), max_size=2),
    max_size=2,
)  # fmt: skip
floats = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 1 << 62)
later = (
    st.builds(Configure, st.text(max_size=8))
    | st.builds(Edit, st.text(max_size=8))
    | st.builds(Results, st.dictionaries(names, st.builds(FileEntry, names, st.text(max_size=8), counts), max_size=2))
    | st.builds(
        Checkpoint, number=counts, files=files, visits=counts, data=st.none() | st.text(max_size=3),
        within=st.none() | st.builds(Within, counts, counts, st.builds(Sums, floats, counts, counts, counts)),
        totals=st.builds(Totals, floats, floats, counts, st.none() | floats), finished=st.booleans(),
    )
)  # fmt: skip


def checkpoint(number: int) -> Checkpoint:
    """An entry as the run folder writes it: it ends in nested braces."""
    return Checkpoint(number=number, files={"000": {"weights": FileEntry(f"000@{number}.safetensors", "ab" * 16, 100)}})


BEGIN = Begin(format=FORMAT, config="seed = 1", net=[Fingerprint("linear 3-2", "ab", (0.5, 1e-300))])


def journal(path: Path, *given_entries: Entry) -> Journal:
    """A run's journal with these entries behind its first."""
    path.unlink(missing_ok=True)
    made = Journal(path)
    made.append(BEGIN)
    for entry in given_entries:
        made.append(entry)
    return made


def test_no_journal_has_no_entries(tmp_path: Path) -> None:
    assert list(Journal(tmp_path / "j").entries()) == []


@fuzzing
@given(given_entries=st.lists(later, max_size=4))
def test_entries_come_back_in_the_order_in_which_they_were_written(given_entries: list[Entry], tmp_path: Path) -> None:
    assert list(journal(tmp_path / "j", *given_entries).entries()) == [BEGIN, *given_entries]


@fuzzing
@given(cut=st.integers(0, 10_000))
def test_a_journal_cut_anywhere_holds_all_lines_before_the_cut(cut: int, tmp_path: Path) -> None:
    written = journal(tmp_path / "j", *map(checkpoint, (1, 2, 3)))
    content = written.path.read_bytes()
    cut %= len(content) + 1
    written.path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    found = list(written.entries())
    everything = [BEGIN, *map(checkpoint, (1, 2, 3))]
    assert found in (everything[:whole], everything[: whole + 1])


def cuts_of_last_line() -> list[Any]:
    """Bytes left of a last line: few, in the middle, and all of its end, which is braces."""
    return [1, 2, 10, 60, *range(-12, 0)]


@pytest.mark.parametrize("left", cuts_of_last_line())
def test_appending_after_a_torn_line_works(left: int, tmp_path: Path) -> None:
    written = journal(tmp_path / "j", checkpoint(1), checkpoint(2))
    content = written.path.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1
    written.path.write_bytes(content[:start] + content[start:][:left])
    survived = list(written.entries())
    assert survived in ([BEGIN, checkpoint(1)], [BEGIN, checkpoint(1), checkpoint(2)])
    written.append(checkpoint(3))
    assert list(written.entries()) == [*survived, checkpoint(3)]
    written.append(checkpoint(4))
    assert list(written.entries()) == [*survived, checkpoint(3), checkpoint(4)]


def test_a_journal_torn_twice_keeps_what_was_whole(tmp_path: Path) -> None:
    written = journal(tmp_path / "j", checkpoint(1))
    for number in (2, 3):
        whole = written.path.read_bytes()
        written.append(checkpoint(number))
        written.path.write_bytes(written.path.read_bytes()[: len(whole) + 20])
        assert list(written.entries()) == [BEGIN, checkpoint(1)]
    written.append(checkpoint(4))
    assert list(written.entries()) == [BEGIN, checkpoint(1), checkpoint(4)]


@fuzzing
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_middle_is_found_or_harmless(at: int, bit: int, tmp_path: Path) -> None:
    expected = [BEGIN, *(checkpoint(number) for number in (1, 2, 3, 4))]
    written = journal(tmp_path / "j", *expected[1:])
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
    written = journal(tmp_path / "j", checkpoint(1), checkpoint(2), checkpoint(3))
    lines = written.path.read_bytes().split(b"\n")
    lines[1] = lines[1][:-1] + b"|"
    written.path.write_bytes(b"\n".join(lines))
    with pytest.raises(CorruptError, match="line 2 is damaged"):
        list(written.entries())


def test_two_damaged_lines_at_the_end_are_found(tmp_path: Path) -> None:
    written = journal(tmp_path / "j", checkpoint(1), checkpoint(2), checkpoint(3))
    content = written.path.read_bytes()
    content = content.replace(b'"number":2', b'"number":7').replace(b'"number":3', b'"number":8')
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
    Journal(tmp_path / "j").append(BEGIN)
    size = (tmp_path / "j").stat().st_size
    assert seen == [("j", size), (tmp_path.name, size)]  # a new file's name is made durable too


def test_a_refusing_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = journal(tmp_path / "j", checkpoint(1))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="j: no space left on device"):
        written.append(checkpoint(2))


def test_an_append_after_a_failed_one_keeps_the_journal_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = journal(tmp_path / "j", checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(StorageError):
            written.append(checkpoint(2))
    written.append(checkpoint(3))
    assert list(written.entries())[-1] == checkpoint(3)
    assert list(written.entries())[:2] == [BEGIN, checkpoint(1)]


def test_a_journal_that_grows_is_replaced_by_what_readers_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLACK", 300)
    compact, whole = Journal(tmp_path / "a"), History()
    whole.add(BEGIN)
    compact.append(BEGIN)
    for number in range(1, 60):
        entries: list[Entry] = [checkpoint(number)]
        entries += [Edit(f"edit {number}")] if number % 20 == 1 else []
        entries += [Configure(f"seed = {number}")] if number % 7 == 0 else []
        for each in entries:
            compact.append(each)
            whole.add(each)
            assert compact.history() == Journal(tmp_path / "a").history() == whole
    compact.append(Results({"model": FileEntry("model.safetensors", "ab", 3)}))
    assert Journal(tmp_path / "a").history().results["model"].size == 3
    assert (tmp_path / "a").stat().st_size < 3000
    compact.append(checkpoint(99))
    assert Journal(tmp_path / "a").history().results == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_journal_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    known = journal(tmp_path / "j", *map(checkpoint, range(1, 30)))
    before = (tmp_path / "j").read_bytes()
    monkeypatch.setattr(module, "SLACK", 0)

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if operation == "replace" else os, operation, refuse)
    with pytest.raises(StorageError):
        known.append(checkpoint(30))
    assert (tmp_path / "j").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["j"]
