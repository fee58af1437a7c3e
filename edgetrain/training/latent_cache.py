"""The latents that exist at the moment, by number: latents 0 are the inputs, latents i+1 are what cell i emits.

A checkpoint in the middle of a range of ``sequence`` includes the latents that are still to be read, since the
weights that they came from are gone. Until the next checkpoint they are neither overwritten nor deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import torch

from edgetrain.errors import CorruptError
from edgetrain.planning.schedule import Cut, Visit
from edgetrain.planning.workload import Workload
from edgetrain.store.atomic import storage_errors, sync_folder
from edgetrain.store.entries import LatentStream, SavedLatents
from edgetrain.store.run import RunFolder
from edgetrain.stream.latents import DeviceLatents, FileLatents, Latents
from edgetrain.stream.state import Host


class LatentCache:
    """Makes latents where a visit emits them, and frees them when they are no longer needed.

    Args:
        work: the run.
        cut: how much of the latents is held at once.
        folder: of files.
        resident: whether latents stay on the device instead.
        host: the meter's scope for host tensors.
        background: whether a thread writes files.
        keep: leave latents that nobody needs any more.
    """

    def __init__(
        self, work: Workload, cut: Cut, folder: RunFolder, resident: bool, host: Host, background: bool, keep: bool
    ):
        self._work, self._cut, self._folder, self._resident = work, cut, folder, resident
        self._keep, self._host, self._background = keep, host, background
        self._held: dict[int, Latents] = {}
        self._saved: list[FileLatents] = []
        self._saving: list[FileLatents] = []
        self._spare: FileLatents | None = None
        self._stale: set[int] = set()  # kept, though no longer needed
        self._bytes = self.peak = self._sums = self._new_sums = 0

    def __getitem__(self, number: int) -> Latents:
        return self._held[number]

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def begin(self, inputs: Latents) -> None:
        """Take up the prepared inputs."""
        self._held[0] = inputs

    def make(self, visit: Visit, goes_on: bool = False) -> Latents:
        """Where the visit's cell emits to; a visit that continues appends to what it emitted before."""
        number = visit.node + 1
        self._stale.discard(number)
        if goes_on or (visit.emit == "cached" and visit.first > 0):
            return self._held[number]
        if number in self._held:
            self._let_go(number)
        work, step_order = self._work, visit.emit in ("training", "again")
        whole = visit.emit in ("finished", "cached")
        rows = work.rows * work.views if whole else work.range_rows(self._cut)
        if self._resident:
            self._held[number] = DeviceLatents(rows, work.latent_dtype, step_order)
        else:
            first = 0 if whole else visit.first * work.batch_size
            self._held[number] = self._in_files(number, rows, step_order, first)
        return self._held[number]

    def free(self, numbers: tuple[int, ...]) -> None:
        """Nobody reads these any more."""
        if self._keep:
            self._stale.update(numbers)
            return
        for number in numbers:
            if number:  # the inputs cost nothing to keep, and resuming wants them
                self._let_go(number)

    # -- checkpoints -----------------------------------------------------------------------------------

    def has_room(self, spare: int | None) -> bool:
        """Whether the disk has room for what a checkpoint keeps from being overwritten.

        Args:
            spare: bytes of the disk budget that the plan does not need, of which only latents on the device that a
                checkpoint writes take any; ``None``: no limit but the disk's.
        """
        needed = sum(_size(latents) for number, latents in self._held.items() if number)
        if spare is not None:
            return not self._resident or 2 * needed <= spare
        return shutil.disk_usage(self._folder.path).free > 2 * needed

    def save(self, number: int) -> dict[int, SavedLatents]:
        """Make all latents but the inputs durable, for the checkpoint of that number; what it says of them.

        Raises:
            StorageError: the disk refused.
        """
        found: dict[int, SavedLatents] = {}
        self._new_sums = 0
        with storage_errors(self._folder.path):
            sync_folder(self._folder.path)  # the folder of latents may be new
        for latents, held in self._held.items():
            if latents and latents not in self._stale:
                files = held if isinstance(held, FileLatents) else self._copied(latents, held)
                self._saving.append(files)
                streams = files.save(number)
                self._new_sums += sum(stream.sums.size for stream in streams)
                found[latents] = SavedLatents(files.rows, files.first, files.step_order, streams)
        self._folder.usage.took(self._new_sums)
        return found

    def settle(self) -> None:
        """The newest checkpoint counts: what only the one before it needed may go."""
        needed, before = self._saving, self._saved
        self._saving, self._saved = [], needed
        for files in needed:
            files.settle()
        self._folder.usage.took(-self._sums)
        self._sums, self._new_sums = self._new_sums, 0
        for files in before:
            if files not in needed and files not in self._held.values():
                files.free()

    def reopen(self, saved: Mapping[int, SavedLatents], device: torch.device) -> None:
        """Take up the latents of a checkpoint.

        Raises:
            CorruptError: a file does not hold what was saved, or the run cannot have such latents.
            StorageError: one is missing or unreadable.
        """
        check_latents(saved, self._work)
        for number, latents in saved.items():
            files = self._files(latents.rows, latents.step_order, latents.first, self._free_name(number))
            self._saved.append(files)
            files.reopen(latents.streams)
            self._held[number] = DeviceLatents.copied(files, device, self._host) if self._resident else files

    def close(self) -> None:
        """Give the device's room back, and files that no checkpoint needs."""
        needed = [*self._saved, *self._saving]  # which of them counts only the journal knows
        for number in [number for number in self._held if number]:
            latents = self._held.pop(number)
            if isinstance(latents, FileLatents) and (self._keep or latents in needed):
                latents.close()
            else:
                latents.free()
        for files in needed:
            files.close()
        self._held.clear()
        if self._spare is not None:
            self._spare.free()

    # ----------------------------------------------------------------------------------------------

    def _let_go(self, number: int) -> None:
        freed = self._held.pop(number)
        if freed in self._saved:
            return
        if isinstance(freed, FileLatents) and self._spare is None:
            self._spare = freed
        else:
            freed.free()

    def _copied(self, number: int, latents: Latents) -> FileLatents:
        assert isinstance(latents, DeviceLatents)
        target = self._files(latents.rows, latents.step_order, 0, self._free_name(number))
        return latents.copy_to(target)

    def _in_files(self, number: int, rows: int, step_order: bool, first: int) -> FileLatents:
        if (spare := self._take_spare(self._work.nodes[number - 1].shape, rows)) is not None:
            return spare.reused(self._free_name(number, spare), step_order, first)
        return self._files(rows, step_order, first, self._free_name(number))

    def _files(self, rows: int, step_order: bool, first: int, name: str) -> FileLatents:
        folder = self._folder
        return FileLatents(
            folder.latents,
            name,
            rows,
            self._work.latent_dtype,
            step_order,
            self._host,
            self._space,
            folder.usage.wrote,
            self._background,
            first=first,
            device=self._work.device,
        )

    def _free_name(self, number: int, spare: FileLatents | None = None) -> str:
        """A name that no latents have which the newest checkpoint needs; ``spare`` gives its own up."""
        own = set() if spare is None else {file.path for file in spare.files.values()}
        found = set(self._folder.latents.glob(f"{number:03}*")) - own
        taken = {path.name.partition(".")[0] for path in found}
        names = (f"{number:03}{letter}" for letter in ("", "b", "c"))
        return next(name for name in names if name not in taken)

    def _take_spare(self, shape: tuple[int, ...], rows: int) -> FileLatents | None:
        """Files that are no longer needed, if latents of this shape fit them; others are deleted.

        Overwriting costs a third of writing a new file, whose pages the system must find and clear.
        """
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        if spare.rows == rows and all(layout.shape == shape for layout in spare.formats.values()):
            return spare
        spare.free()
        return None

    def _space(self, size: int) -> None:
        self._folder.usage.took(size)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)


def check_latents(saved: Mapping[int, SavedLatents], work: Workload) -> None:
    """Refuse latents in a checkpoint that the run cannot have.

    Raises:
        CorruptError: it has no such latents.
    """
    for number, latents in saved.items():
        known = 0 < number <= work.depth and latents.rows <= work.rows * work.views and latents.first < work.rows
        if not known or not all(_is_known(stream, number, latents.rows, work) for stream in latents.streams):
            raise CorruptError(f"the newest checkpoint does not fit this run: latents {number} are of another")


def _is_known(stream: LatentStream, number: int, rows: int, work: Workload) -> bool:
    shape, names = list(work.nodes[number - 1].shape), work.formats_into(number)
    return stream.written <= rows and stream.shape == shape and stream.stream in names


def _size(latents: Latents) -> int:
    return latents.rows * sum(layout.row_bytes for layout in latents.formats.values())
