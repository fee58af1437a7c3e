"""Sizes and times as people read them. Every ``_mb`` of edgetrain is in MiB (2**20 bytes)."""

from __future__ import annotations

import math

MIB = 1 << 20


def to_mb(size: float | None) -> float | None:
    """Bytes as MiB rounded to three decimals; ``None`` (unknown) stays ``None``."""
    return None if size is None else round(size / MIB, 3)


def ceil_mb(size: int) -> float:
    """Bytes as the smallest number of MiB, in steps of 0.01, that holds them all."""
    return math.ceil(size * 100 / MIB) / 100


def ceil_gb(size: int) -> float:
    """Bytes as the smallest number of GiB, in steps of 0.0001, that holds them all."""
    return math.ceil(size * 10_000 / (1024 * MIB)) / 10_000


def from_mb(megabytes: float) -> int:
    """MiB as whole bytes, rounded down."""
    return math.floor(megabytes * MIB)


def stated_mb(size: int) -> str:
    """Bytes as the shortest number of MiB that stands for them: a limit as the user stated it."""
    found = next(found for digits in range(1, 18) if from_mb(found := float(f"{size / MIB:.{digits}g}")) == size)
    return f"{found:.15g}"


def show_mb(size: float | None) -> str:
    """Bytes for a person: ``12.3 MiB``, or ``unknown``."""
    if size is None:
        return "unknown"
    megabytes = size / MIB
    if megabytes >= 10 * 1024:
        return f"{megabytes / 1024:,.1f} GiB"
    return f"{megabytes:,.1f} MiB" if megabytes >= 0.1 else f"{size / 1024:.1f} KiB"


def show_seconds(seconds: float) -> str:
    """Seconds for a person: ``1.2 s``, ``3:05``, ``2:03:05``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
