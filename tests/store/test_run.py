"""A run's folder: checkpoints, finishing, the lock. ``pytest tests/store/test_run.py``."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from machine import begin, named
from safetensors.torch import load_file

import edgetrain
from edgetrain.errors import BusyError, CorruptError, InputError, StorageError
from edgetrain.store import run as module
from edgetrain.store import units as units_module
from edgetrain.store.atomic import size_of
from edgetrain.store.entries import Checkpoint
from edgetrain.store.journal import _check
from edgetrain.store.run import RunFolder
from edgetrain.store.units import UnitFiles

ROOT = Path(edgetrain.__file__).parents[1]


def unit(value: float, optimizer: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    weights = {"cell.weight": torch.full((2, 3), value), "head.weight": torch.full((4,), value)}
    state = {"step.cell.weight.exp_avg": torch.full((2, 3), -value)}
    return {"weights": weights, "optim": state} if optimizer else {"weights": weights}


def at(number: int, **more: Any) -> Checkpoint:
    return Checkpoint(number=number, **more)


def made(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(begin("seed = 1\n"))
    return folder


def value_of(folder: RunFolder, name: str) -> float:
    """What a unit was saved with; every tensor of it must agree."""
    tensors = named(folder.units.read(folder.files()[name]))
    values = {abs(float(value.flatten()[0])) for value in tensors.values()}
    assert len(tensors) == 3
    assert len(values) == 1
    return values.pop()


def cells(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "cells").iterdir())


# --- making and clearing ----------------------------------------------------------------------


def test_a_new_folder_holds_its_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    assert folder.is_free()
    assert not folder.is_run()
    folder.create(begin("seed = 1\n"))
    assert (folder.path / "config.toml").read_text() == "seed = 1\n"
    assert folder.is_run()
    assert not folder.is_free()
    assert folder.last() is None
    assert folder.files() == {}


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise StorageError("disk: no space left on device")

    monkeypatch.setattr(module, "write_text", full)
    with pytest.raises(StorageError):
        RunFolder(tmp_path / "a").create(begin("x"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="not a directory"):
        RunFolder(tmp_path / "file" / "a").create(begin("x"))


def test_clearing_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="holds no edgetrain run"):
        RunFolder(tmp_path).clear()
    assert (tmp_path / "cells" / "thesis.txt").read_text() == "all of it"


def test_clearing_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    folder.save(at(1), [("000", unit(1))])
    (folder.path / "my notes.txt").write_text("keep")
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["my notes.txt"]
    assert not folder.is_run()


def test_clearing_does_not_follow_a_link_out_of_the_run(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("precious")
    shutil.rmtree(folder.latents, ignore_errors=True)
    folder.latents.symlink_to(elsewhere)
    folder.clear()
    assert (elsewhere / "data").read_text() == "precious"


def test_working_files_are_cleared_and_checkpoints_stay(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    folder.save(at(1), [("000", unit(1))])
    for working in (folder.latents, folder.units.scratch):
        working.mkdir(exist_ok=True)
    (folder.latents / "001.x.rows").write_bytes(b"x")
    (folder.units.scratch / "000.safetensors").write_bytes(b"x")
    folder.clear_working_files()
    assert not (folder.latents / "001.x.rows").exists()
    assert not folder.units.scratch.exists()
    assert value_of(folder, "000") == 1


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_changed_and_all_that_was_saved_before(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    folder.save(at(1, visits=3), [("000", unit(1)), ("001", unit(2))])
    files = folder.save(at(2, visits=4), [("001", unit(5))])
    assert files == folder.files()
    assert (value_of(folder, "000"), value_of(folder, "001")) == (1, 5)
    assert folder.last() == at(2, visits=4, files=files)
    assert cells(folder) == [
        "000@1.optim.safetensors",
        "000@1.safetensors",
        "001@2.optim.safetensors",
        "001@2.safetensors",
    ]


def test_the_optimizer_has_a_file_of_its_own_and_can_be_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    files = folder.save(at(1), [("000", unit(1)), ("001", unit(2, optimizer=False))])
    assert set(files["000"]) == {"weights", "optim"}
    assert set(files["001"]) == {"weights"}
    assert folder.units.read(files["000"], optimizer=False).keys() == {"weights"}


class PowerCut(BaseException):
    """The machine is gone."""


def cut_off(*arguments: Any, **named: Any) -> None:
    raise PowerCut


@pytest.mark.parametrize("where", ["first file", "second unit", "journal"])
def test_the_checkpoint_before_holds_when_the_power_fails_before_the_journal_line(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "a")
    folder.save(at(1), [("000", unit(1)), ("001", unit(2))])

    def units() -> Any:
        if where == "first file":
            monkeypatch.setattr(units_module, "write_tensors", cut_off)
        yield "000", unit(7)
        if where == "second unit":
            raise PowerCut
        yield "001", unit(8)

    if where == "journal":
        monkeypatch.setattr(module.Journal, "append", cut_off)
    with pytest.raises(PowerCut):
        folder.save(at(2), units())
    monkeypatch.undo()
    again = RunFolder(folder.path)
    assert (value_of(again, "000"), value_of(again, "001")) == (1, 2)
    again.save(at(2), [("000", unit(9))])
    assert (value_of(again, "000"), value_of(again, "001")) == (9, 2)


def test_the_new_checkpoint_holds_when_the_power_fails_after_the_journal_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "a")
    folder.save(at(1), [("000", unit(1))])
    monkeypatch.setattr(UnitFiles, "remove", cut_off)
    with pytest.raises(PowerCut):
        folder.save(at(2), [("000", unit(2))])
    monkeypatch.undo()
    assert value_of(RunFolder(folder.path), "000") == 2


def test_a_torn_journal_line_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "a")
    folder.save(at(1), [("000", unit(1))])
    monkeypatch.setattr(UnitFiles, "remove", lambda *a: None)  # the line is torn: nothing was removed yet
    folder.save(at(2), [("000", unit(2))])
    journal = folder.journal.path
    journal.write_bytes(journal.read_bytes()[:-30])
    assert value_of(RunFolder(folder.path), "000") == 1


def test_files_are_on_the_medium_before_the_journal_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "a")
    log = watched(monkeypatch)
    folder.save(at(1), [("000", unit(1))])
    line = log.index("fsync journal.jsonl")
    for name in ("000@1.safetensors", "000@1.optim.safetensors"):
        renamed = log.index(f"rename {name}")
        assert log.index(f"fsync .{name}.tmp") < renamed
        assert "fsync cells" in log[renamed:line]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every fsync and rename from now on, in order."""
    log: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def note_fsync(descriptor: int) -> None:
        log.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note(real: Any) -> Any:
        def renaming(self: Path, target: Path) -> Path:
            log.append(f"rename {Path(target).name}")
            return real(self, target)

        return renaming

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note(replace))
    monkeypatch.setattr(Path, "rename", note(rename))
    return log


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "a")
    folder.save(at(1), [("000", unit(1))])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            folder.save(at(2), [("000", unit(2))])
    assert value_of(folder, "000") == 1


def test_a_damaged_cell_is_found_when_it_is_read(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    files = folder.save(at(1), [("000", unit(1))])
    path = folder.units.path_of(files["000"]["optim"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    folder.units.read(files["000"], optimizer=False)
    with pytest.raises(CorruptError, match=r"000@1\.optim\.safetensors: checksum"):
        folder.units.read(files["000"])


def test_a_deleted_cell_is_a_storage_error(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    files = folder.save(at(1), [("000", unit(1))])
    folder.units.path_of(files["000"]["weights"]).unlink()
    with pytest.raises(StorageError, match=r"000@1\.safetensors: no such file"):
        folder.units.read(files["000"])


@pytest.mark.parametrize("files", [3, [], {"000": 3}, {"000": {"weights": {"name": "x"}}}, {"000": {"weights": 1}}])
def test_a_journal_line_that_names_no_files_is_corrupt(files: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    write_entry(folder, {"type": "checkpoint", "number": 1, "files": files})
    with pytest.raises(CorruptError, match=r"journal.jsonl: line 2 is not an entry of a journal"):
        folder.files()


def write_entry(folder: RunFolder, entry: Any) -> None:
    """Append any JSON to the journal, with the right checksum."""
    content = json.dumps(entry).encode()
    with folder.journal.path.open("ab") as file:
        file.write(b'{"check": "%s", "entry": %s}\n' % (_check(content), content))


# --- finishing --------------------------------------------------------------------------------


def saved(path: Path) -> RunFolder:
    folder = made(path)
    folder.save(at(1, visits=3), [("000", unit(1)), ("001", unit(2)), ("classifier", unit(3))])
    folder.save(at(2, visits=4), [("001", unit(5))])
    return folder


def assert_whole(folder: RunFolder) -> None:
    assert (value_of(folder, "000"), value_of(folder, "001"), value_of(folder, "classifier")) == (1, 5, 3)


def test_finishing_gives_plain_names(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    files = folder.finish(at(3, visits=4))
    plain = [f"{name}{kind}.safetensors" for name in ("000", "001", "classifier") for kind in (".optim", "")]
    assert cells(folder) == plain
    assert files == folder.files()
    assert folder.last() == at(3, visits=4, files=files, finished=True)
    assert_whole(folder)


@pytest.mark.parametrize("renames", range(7))
def test_a_run_cut_off_between_two_renames_is_readable_and_can_be_finished(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real, done = saved(tmp_path / "a"), Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise PowerCut
        done.append(target)
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if renames == 6:
            patch.setattr(module.Journal, "append", cut_off)
        with pytest.raises(PowerCut):
            folder.finish(at(3))
    assert len(done) == renames
    again = RunFolder(folder.path)
    assert not again.last().finished  # type: ignore[union-attr]
    assert_whole(again)
    again.finish(at(3))
    assert_whole(again)
    assert len(cells(again)) == 6


def test_renames_are_durable_before_the_journal_says_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")
    log = watched(monkeypatch)
    folder.finish(at(3))
    line = log.index("fsync journal.jsonl")
    last = max(number for number, what in enumerate(log) if what.startswith("rename"))
    assert "fsync cells" in log[last:line]


def test_the_model_is_one_file_of_all_weights_that_loads_alone(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a")
    found = load_file(folder.path / "model.safetensors")
    units = ("000", "001", "classifier")
    assert set(found) == {f"{name}.{kind}.weight" for name in units for kind in ("cell", "head")}
    assert torch.equal(found["001.cell.weight"], torch.full((2, 3), 5.0))


def finished(path: Path) -> RunFolder:
    folder = saved(path)
    folder.finish(at(3))
    folder.write_results({"format": 1}, lambda: {"test_accuracy": 0.5, "energy_j": None})
    return folder


def test_a_record_is_json(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a")
    assert folder.is_finished()
    assert json.loads(folder.read_record()) == {"test_accuracy": 0.5, "energy_j": None}


def test_a_run_is_not_finished_before_its_results_are_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    folder.finish(at(3))
    assert not folder.is_finished()
    with pytest.raises(InputError, match="holds an unfinished run"):
        folder.read_record()


@pytest.mark.parametrize("name", ["record.json", "model.safetensors"])
def test_damaged_results_are_found(name: str, tmp_path: Path) -> None:
    folder = finished(tmp_path / "a")
    content = bytearray((folder.path / name).read_bytes())
    content[-3] ^= 1
    (folder.path / name).write_bytes(content)
    assert not folder.is_finished()
    if name == "record.json":
        with pytest.raises(CorruptError, match=r"record\.json: checksum .* fit --resume"):
            folder.read_record()


# --- the configuration ------------------------------------------------------------------------


def test_the_journal_remembers_the_configuration(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    written = (folder.path / "config.toml").read_text()
    assert folder.config() == written
    assert not folder.restore_config()
    for damage in (lambda path: path.write_text("seed = 7\n"), lambda path: path.unlink()):
        damage(folder.path / "config.toml")
        assert folder.restore_config()
        assert (folder.path / "config.toml").read_text() == written


# --- untrusted folders  -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../precious", "/etc/precious", ".hidden", "a/b", "", "a\n", 3])
def test_a_journal_that_names_a_file_elsewhere_is_corrupt(name: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    file = {"name": name, "checksum": "0", "size": 1}
    write_entry(folder, {"type": "checkpoint", "number": 1, "files": {"000": {"weights": file}}})
    with pytest.raises(CorruptError, match=r"journal\.jsonl: line 2 is not an entry of a journal"):
        folder.files()


def test_a_folder_with_a_config_of_its_own_is_no_run_of_ours(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_bytes(b"art")
    (tmp_path / "config.toml").write_text("theme = 'dark'")
    folder = RunFolder(tmp_path)
    assert not folder.is_run()
    with pytest.raises(InputError, match="holds no edgetrain run"):
        folder.clear()
    assert (tmp_path / "figures" / "mine.png").exists()


def test_something_else_than_a_file_is_corrupt(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    files = folder.save(at(1), [("000", unit(1))])
    path = folder.units.path_of(files["000"]["weights"])
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(CorruptError, match="is not a regular file"):
        folder.units.read(files["000"])


@pytest.mark.parametrize("number", ["x", None, -1, 1 << 70, 2.0])
def test_a_checkpoint_without_a_number_is_corrupt(number: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    write_entry(folder, {"type": "checkpoint", "number": number, "files": {}})
    with pytest.raises(CorruptError, match="line 2 is not an entry of a journal"):
        folder.last()


@pytest.mark.parametrize("name", ["cells", "latents", "scratch", "figures", "lock", "journal.jsonl", "record.json"])
def test_a_folder_with_a_link_is_not_worked_in(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    member = folder.path / name
    shutil.rmtree(member, ignore_errors=True)
    member.unlink(missing_ok=True)
    member.symlink_to(elsewhere)
    with pytest.raises(CorruptError, match=f"{name}: is a link"), folder.locked():
        pass
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize("kind", ["weights", "optim"])
def test_a_bit_that_flips_in_a_spilled_cell_is_found(kind: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    spilled = folder.units.spill("000", unit(1))
    assert named(folder.units.unspill(spilled)).keys() == named(unit(1)).keys()
    path = folder.units.scratch / spilled.files[kind].name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=f"{path.name}: checksum"):
        folder.units.unspill(spilled)
    with pytest.raises(CorruptError, match=f"{path.name}: checksum"):
        folder.save(at(1), [("000", spilled)])
    assert folder.last() is None


# --- accounts ---------------------------------------------------------------------------------


def test_space_and_writes_are_those_of_the_files(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")

    def on_disk() -> int:
        return sum(path.stat().st_size for path in (folder.path / "cells").iterdir())

    folder.save(at(1), [("000", unit(1)), ("001", unit(2))])
    first = on_disk()
    assert folder.usage.written == first
    assert folder.usage.peak == size_of(folder.path)  # journal and settings too
    folder.save(at(2), [("000", unit(3))])
    assert folder.usage.written == first + first // 2
    assert folder.usage.peak == size_of(folder.path) + first // 2  # both generations, for a moment
    folder.save(at(3), [("001", unit(3))])
    assert folder.usage.peak == size_of(folder.path) + first // 2


# --- the lock ---------------------------------------------------------------------------------


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    with folder.locked(), pytest.raises(BusyError, match="another edgetrain works"), RunFolder(folder.path).locked():
        pass
    with RunFolder(folder.path).locked():
        pass


def test_a_holder_in_another_thread_is_refused(tmp_path: Path) -> None:
    folder, refused = made(tmp_path / "a"), []

    def other() -> None:
        try:
            with RunFolder(folder.path).locked():
                pass
        except (BusyError, StorageError) as error:
            refused.append(error)

    with folder.locked():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert [type(error) for error in refused] == [BusyError]


HOLD = (
    "import sys; from pathlib import Path; from edgetrain.store.run import RunFolder\n"
    "with RunFolder(Path(sys.argv[1])).locked():\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


def test_another_process_is_refused_until_this_one_dies(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError), folder.locked():
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with folder.locked():  # the lock of a dead process is void
        assert (folder.path / "lock").exists()


def test_the_lock_is_released_when_the_body_fails(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    with pytest.raises(KeyError), folder.locked():
        raise KeyError
    second = RunFolder(folder.path)
    with second.locked(), pytest.raises(BusyError), folder.locked():
        pass


def test_a_lock_taken_while_another_is_given_back_keeps_third_parties_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between giving back and removing the file a second holder may come; a third must still be refused."""
    folder, second = made(tmp_path / "a"), FileLock(tmp_path / "a" / "lock", timeout=0)
    real = FileLock.release

    def release(self: Any, force: bool = False) -> None:
        real(self, force)
        if self is not second and not second.is_locked:
            second.acquire()

    monkeypatch.setattr(type(second), "release", release)
    with folder.locked():
        pass
    monkeypatch.undo()
    try:
        assert second.is_locked
        with pytest.raises(BusyError), RunFolder(folder.path).locked():
            pass
    finally:
        second.release()
