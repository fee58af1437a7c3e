"""Tiny data files in the known layouts, and what every reader's output is held against."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from edgetrain.data.base import DataSet, Part
from edgetrain.errors import EdgetrainError

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}

fuzzing = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def idx_images(images: np.ndarray) -> bytes:
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def idx_labels(labels: np.ndarray) -> bytes:
    return struct.pack(">2I", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()


def cifar_rows(images: np.ndarray, labels: np.ndarray, label_bytes: int = 1) -> bytes:
    head = np.full((len(labels), label_bytes), 19, np.uint8)
    head[:, -1] = labels
    return np.concatenate([head, images.reshape(len(labels), -1)], axis=1).tobytes()


def pixels(*dims: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, dims, np.uint8)


def cycle(rows: int, classes: int) -> np.ndarray:
    """Labels 0, 1, .. classes-1, 0, 1, ..."""
    return np.arange(rows) % classes


def put(path: Path, content: bytes, suffix: str = "") -> Path:
    """Write ``content`` packed as ``suffix`` asks; returns the path with the suffix."""
    target = path.with_name(path.name + suffix)
    target.write_bytes(PACKERS[suffix](content))
    return target


def rows_of(part: Part | None) -> tuple[np.ndarray, np.ndarray | None]:
    """All rows and labels of a part."""
    assert part is not None
    values, labels = zip(*part.chunks(), strict=True)
    x = np.concatenate(values)
    assert len(x) == part.rows
    return x, None if labels[0] is None else np.concatenate(labels)


def survives(opener: Callable[[], DataSet]) -> None:
    """Open and read everything; any error but ours is a failure of the test, and ours is one line."""
    try:
        data = opener()
        for part in (data.train, data.test):
            for values, _ in part.chunks() if part else ():
                assert values.shape[1:] == data.shape
    except EdgetrainError as error:
        _check_line(error)


def _check_line(error: EdgetrainError) -> None:
    assert "\n" not in str(error)
    assert error.exit_code in (2, 3, 4)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, header: int) -> bytes:
    """``content`` cut short, lengthened, or with bytes changed, mostly among the first ``header``."""
    found = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        span = draw(st.sampled_from([header, header, len(found)]))
        found[draw(st.integers(0, min(span, len(found)) - 1))] = draw(st.integers(0, 255))
    kept = draw(st.sampled_from([len(found), None]))
    cut = draw(st.integers(0, len(found))) if kept is None else kept
    return bytes(found[:cut]) + draw(st.binary(max_size=3))


@contextlib.contextmanager
def small_chunks(monkeypatch, size: int):
    with monkeypatch.context() as patch:
        patch.setattr("edgetrain.data.chunks.CHUNK_BYTES", size)
        yield
