"""A change to a finished run, made in a folder within the run's, so that a failed edit leaves the run as it was.

``RUN/edit/`` is a whole run folder that begins with some of the finished run's cells. When it is finished it is
renamed to ``RUN/adopted/``: from that moment it counts, and its files are moved to where the old ones are, the
journal last. A crash in between is made good by the next process that opens the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from msgspec import structs

from edgetrain.store.atomic import storage_errors, sync_file, sync_folder
from edgetrain.store.entries import Begin, Checkpoint, Edit
from edgetrain.store.run import ADOPTED, EDIT, MODEL, RECORD, REPORT, RunFolder


def open_folder(path: Path) -> RunFolder:
    """The folder of a run, in which an interrupted ``adopt`` is finished first.

    Raises:
        BusyError: another process works in it.
        CorruptError: a link is in the place of one of its files or folders.
        StorageError: the disk refused.
    """
    folder = RunFolder(path)
    folder.refuse_links()
    if (path / ADOPTED).is_dir():
        with folder.locked():
            _move_adopted(folder)
    return folder


def start(folder: RunFolder, begin: Begin, words: str, checkpoint: Checkpoint) -> RunFolder:
    """The folder of an edit; one that was started in the same way and then stopped is resumed.

    Args:
        folder: of the finished run.
        begin: the edited run; files of the units that it keeps are linked, not copied, where the file system can.
        words: what is changed.
        checkpoint: where the edit starts from.

    Raises:
        StorageError: the disk refused.
    """
    edit = RunFolder(folder.path / EDIT)
    edit.home = folder.path
    if next(edit.journal.entries(), None) == begin and edit.last() is not None:
        return edit
    with storage_errors(edit.path):
        shutil.rmtree(edit.path, ignore_errors=True)
        (edit.path / "cells").mkdir(parents=True)
        for file in (file for kinds in begin.kept.values() for file in kinds.values()):
            _link(folder.units.path_of(file), edit.units.path / file.name)
        sync_folder(edit.path / "cells")
    edit.journal.append(begin)
    for each in (*folder.journal.history().edits, Edit(words)):
        edit.journal.append(each)
    edit.write_config(begin.config)
    edit.journal.append(structs.replace(checkpoint, files=begin.kept))
    return edit


def is_pending(folder: RunFolder) -> bool:
    """Whether a run folder holds an edit that is not finished."""
    return (folder.path / EDIT).is_dir()


def discard(folder: RunFolder) -> None:
    """Remove an edit that is not finished."""
    shutil.rmtree(folder.path / EDIT, ignore_errors=True)


def adopt(folder: RunFolder) -> None:
    """Let a finished edit take the place of the run.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(folder.path):
        (folder.path / EDIT).rename(folder.path / ADOPTED)  # from here on the edited run counts
        sync_folder(folder.path)
    _move_adopted(folder)


def _move_adopted(folder: RunFolder) -> None:
    source, target = folder.path / ADOPTED, folder.path
    with storage_errors(target):
        for path in sorted((source / "cells").glob("*")):
            path.replace(target / "cells" / path.name)
        for name in ("config.toml", MODEL, RECORD, "journal.jsonl"):
            if (source / name).exists():
                (source / name).replace(target / name)
        (target / REPORT).unlink(missing_ok=True)  # it shows the run before
        sync_folder(target / "cells")
        sync_folder(target)
    folder.units.keep_only(RunFolder(target).files())
    shutil.rmtree(source, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        sync_file(target)
