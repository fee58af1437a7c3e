"""What a run takes on disk."""

from __future__ import annotations

from pathlib import Path


class DiskUsage:
    """Counts bytes.

    Attributes:
        taken: on disk now.
        peak: the most that was taken at once.
        written: to disk in all; flash wears out.
    """

    def __init__(self) -> None:
        self.taken = self.peak = self.written = 0

    def begin(self, taken: int) -> None:
        """Count anew: so much is there, and nothing was written yet."""
        self.taken = self.peak = taken
        self.written = 0

    def took(self, size: int) -> None:
        """Bytes were allocated (negative: freed)."""
        self.taken += size
        self.peak = max(self.peak, self.taken)

    def wrote(self, size: int) -> None:
        """Bytes were written into space that is counted already."""
        self.written += size

    def stored(self, size: int) -> None:
        """A new file of that size was written."""
        self.took(size)
        self.wrote(size)

    def replaces(self, path: Path) -> None:
        """A file is about to be removed or written anew."""
        if path.exists():
            self.took(-path.stat().st_size)
