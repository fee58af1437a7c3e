"""Files of a run's units: its cells, the classifier, and how inputs were scaled. A unit has a file of each kind.

``cells/003@7.safetensors`` holds the weights of unit 003 since checkpoint 7, ``cells/003@7.optim.safetensors`` its
optimizer state; a finished run's files lose the number. ``scratch/`` holds units that are not checkpointed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from edgetrain.store.atomic import checksum, storage_errors, sync_folder, verify
from edgetrain.store.entries import FileEntry, Files
from edgetrain.store.tensors import Spilled, move_durably, read_tensors, write_plain, write_tensors
from edgetrain.store.usage import DiskUsage

#: A unit's named tensors by kind of file: ``weights``, ``optim``.
Kinds = Mapping[str, Mapping[str, torch.Tensor]]


class UnitFiles:
    """The files of the units in a run folder. Implements ``stream.cells.Shelf``.

    Args:
        path: the run folder.
        usage: counts bytes.
    """

    def __init__(self, path: Path, usage: DiskUsage):
        self.path, self.scratch, self._usage = path / "cells", path / "scratch", usage

    # -- in checkpoints ----------------------------------------------------------------------------

    def write(self, unit: str, number: int, kinds: Kinds) -> dict[str, FileEntry]:
        """Write a unit durably for the checkpoint of that number.

        Raises:
            StorageError: the disk refused.
        """
        entries = {}
        for kind, tensors in kinds.items():
            entries[kind] = write_tensors(self.path / _name(f"{unit}@{number}", kind), tensors, _metadata(unit))
            self._usage.stored(entries[kind].size)
        return entries

    def adopt(self, unit: str, number: int, spilled: Spilled) -> dict[str, FileEntry]:
        """Make a spilled unit durable for the checkpoint of that number.

        Raises:
            CorruptError: a file does not hold what was written.
            StorageError: the disk refused.
        """
        return {
            kind: move_durably(self.scratch / file.name, self.path / _name(f"{unit}@{number}", kind), file)
            for kind, file in spilled.files.items()
        }

    def path_of(self, file: FileEntry) -> Path:
        """Where a file is: under its own name, or under its final one if finishing was interrupted."""
        path = self.path / file.name
        if not path.exists():
            stem, _, rest = file.name.partition("@")
            final = self.path / f"{stem}.{rest.partition('.')[2]}"
            if rest and final.exists():
                return final
        return path

    def verified(self, file: FileEntry) -> Path:
        """Where a file is, which is as it was written.

        Raises:
            CorruptError: it is not.
        """
        path = self.path_of(file)
        verify(path, file.checksum, file.size)
        return path

    def read(self, files: Mapping[str, FileEntry], optimizer: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """A unit's tensors by kind, verified.

        Args:
            files: of the unit.
            optimizer: whether to read the optimizer state too.

        Raises:
            CorruptError: a file does not hold what was written.
        """
        wanted = {kind: file for kind, file in files.items() if kind == "weights" or optimizer}
        return {kind: read_tensors(self.path_of(file), file) for kind, file in wanted.items()}

    def name_finally(self, files: Files) -> Files:
        """Give the files of a finished run their final names, durably.

        Raises:
            StorageError: the disk refused.
        """
        named: Files = {}
        for unit, kinds in files.items():
            named[unit] = {}
            for kind, file in kinds.items():
                final = _name(unit, kind)
                with storage_errors(self.path / final):
                    self.path_of(file).rename(self.path / final)
                named[unit][kind] = FileEntry(final, file.checksum, file.size)
        with storage_errors(self.path):
            sync_folder(self.path)
        return named

    def remove(self, files: Mapping[str, FileEntry]) -> None:
        """Remove a unit's files that newer ones replaced; what cannot be removed goes when the run is finished."""
        for file in files.values():
            with contextlib.suppress(OSError):
                (self.path / file.name).unlink(missing_ok=True)
            self._usage.took(-file.size)

    def keep_only(self, files: Files) -> None:
        """Remove files of units that the run no longer has."""
        known = {file.name for kinds in files.values() for file in kinds.values()}
        with storage_errors(self.path):
            for path in self.path.iterdir():
                if path.name not in known:
                    path.unlink()

    # -- between checkpoints -----------------------------------------------------------------------

    def spill(self, unit: str, kinds: Kinds) -> Spilled:
        """Put a unit on disk for a while, as it would be checkpointed but without waiting for the medium.

        Raises:
            StorageError: the disk refused.
        """
        files = {}
        with storage_errors(self.scratch):
            self.scratch.mkdir(exist_ok=True)
        for kind, tensors in kinds.items():
            path = self.scratch / _name(unit, kind)
            self._usage.replaces(path)
            with storage_errors(path):
                size = write_plain(path, tensors, _metadata(unit))
            self._usage.stored(size)
            files[kind] = FileEntry(path.name, checksum(path), size)
        return Spilled(files)

    def unspill(self, spilled: Spilled, optimizer: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a spilled unit by kind; its files stay. See ``read``.

        Raises:
            CorruptError: a file does not hold what was written.
        """
        wanted = {kind: file for kind, file in spilled.files.items() if kind == "weights" or optimizer}
        return {kind: read_tensors(self.scratch / file.name, file) for kind, file in wanted.items()}

    def discard(self, spilled: Spilled) -> None:
        """Remove a spilled unit that was not checkpointed."""
        for path in (self.scratch / file.name for file in spilled.files.values()):
            with storage_errors(path):
                self._usage.replaces(path)
                path.unlink(missing_ok=True)


def _name(unit: str, kind: str) -> str:
    return f"{unit}.safetensors" if kind == "weights" else f"{unit}.{kind}.safetensors"


def _metadata(unit: str) -> dict[str, object]:
    return {"unit": unit, "format": 1}
