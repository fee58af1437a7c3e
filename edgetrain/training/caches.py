"""The latents that exist at the moment, by number: latents 0 are the inputs, latents i+1 are what cell i emits."""

from __future__ import annotations

from typing import Any

from edgetrain.planning.schedule import Cut, Visit
from edgetrain.planning.workload import Workload
from edgetrain.store.run import RunFolder
from edgetrain.stream.cell import Host
from edgetrain.stream.latents import DeviceLatents, FileLatents, Latents


class Caches:
    """Makes latents where a visit emits them, and frees them when nobody reads them any more.

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
        self._keep, self._files = keep, {"host": host, "background": background}
        self._held: dict[int, Latents] = {}
        self._spare: FileLatents | None = None
        self._bytes = self.peak = 0

    def __getitem__(self, number: int) -> Latents:
        return self._held[number]

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def begin(self, inputs: Latents) -> None:
        """Take up the prepared inputs."""
        self._held[0] = inputs

    def make(self, visit: Visit) -> Latents:
        """Where the visit's cell emits to."""
        number = visit.node + 1
        if visit.emit == "cached" and visit.first > 0:
            return self._held[number]
        if number in self._held:
            self._held.pop(number).free()
        work, step_order = self._work, visit.emit in ("training", "again")
        whole = visit.emit in ("finished", "cached")
        rows = work.rows * work.views if whole else work.range_rows(self._cut)
        if self._resident:
            self._held[number] = DeviceLatents(rows, work.latent_dtype, step_order)
        else:
            first = 0 if whole else visit.first * work.batch_size
            self._held[number] = self._in_files(visit.node, rows, step_order, first)
        return self._held[number]

    def free(self, numbers: tuple[int, ...]) -> None:
        """Nobody reads these any more."""
        if self._keep:
            return
        for number in numbers:
            if number:  # the inputs cost nothing to keep, and resuming wants them
                freed = self._held.pop(number)
                if isinstance(freed, FileLatents) and self._spare is None:
                    self._spare = freed
                else:
                    freed.free()

    def close(self) -> None:
        """Give the device's room back, and files that wait to be used again."""
        for number, latents in self._held.items():
            if number and isinstance(latents, DeviceLatents):
                latents.free()
        self._held.clear()
        if self._spare is not None:
            self._spare.free()

    def _in_files(self, node: int, rows: int, step_order: bool, first: int) -> FileLatents:
        name, folder = f"{node + 1:03}", self._folder
        if (spare := self._take_spare(self._work.nodes[node].shape, rows)) is not None:
            return spare.reused(name, step_order, first)
        more: dict[str, Any] = {"on_space": self._space, "on_write": folder.wrote, "first": first, **self._files}
        return FileLatents(folder.latents, name, rows, self._work.latent_dtype, step_order, **more)

    def _take_spare(self, shape: tuple[int, ...], rows: int) -> FileLatents | None:
        """Files that nobody reads any more, if latents of this shape fit them; others are deleted.

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
        self._folder.space(size)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
