"""CIFAR binary rows: what was written is read; what is wrong is named in one line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import (
    PACKERS,
    cifar_rows,
    cycle,
    damaged,
    fuzzing,
    pixels,
    put,
    rows_of,
    small_chunks,
    survives,
)

from edgetrain.data.cifar import CifarFiles, CifarRows, open_cifar
from edgetrain.errors import CorruptError, InputError

IMAGES, LABELS = pixels(6, 3, 32, 32), cycle(6, 3)


def opened(paths, rows=6, label_bytes=1):
    files = CifarFiles(paths, rows)
    return open_cifar("tiny", files, files, CifarRows(label_bytes, 3))


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("label_bytes", [1, 2])
def test_rows_are_those_written(tmp_path, monkeypatch, suffix, label_bytes):
    paths = [put(tmp_path / f"{k}.bin", cifar_rows(IMAGES + np.uint8(k), LABELS, label_bytes), suffix) for k in (0, 1)]
    with small_chunks(monkeypatch, 8000):  # two rows a chunk
        data = opened(paths, label_bytes=label_bytes)
        x, y = rows_of(data.test)
    assert (data.shape, data.pixel_max, data.input, data.classes) == ((3, 32, 32), 255.0, "image", 3)
    assert np.array_equal(x, np.concatenate([IMAGES, IMAGES + np.uint8(1)]))
    assert np.array_equal(y, np.concatenate([LABELS, LABELS]))
    assert y.dtype == np.int64


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize(("rows", "message"), [(7, "truncated"), (5, "trailing")])
def test_wrong_size_is_corrupt(tmp_path, suffix, rows, message):
    path = put(tmp_path / "a.bin", cifar_rows(IMAGES, LABELS), suffix)
    with pytest.raises(CorruptError, match=message):
        rows_of(opened([path], rows).train)


def test_label_out_of_range_names_file_and_row(tmp_path):
    path = put(tmp_path / "a.bin", cifar_rows(IMAGES, LABELS + 1))
    with pytest.raises(InputError, match=r"a\.bin: row 2 has label 3, expected 0..2"):
        rows_of(opened([path]).train)


@fuzzing
@given(data=st.data(), suffix=st.sampled_from(list(PACKERS)))
def test_damage_raises_only_our_errors(tmp_path, data, suffix):
    content = data.draw(damaged(cifar_rows(IMAGES[:1], LABELS[:1]), 4))
    path = put(tmp_path / "a.bin", content, suffix)
    survives(lambda: opened([path], rows=1))
