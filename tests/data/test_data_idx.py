"""IDX files: what was written is read; what is wrong is named in one line."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_files import (
    PACKERS,
    cycle,
    damaged,
    fuzzing,
    idx_images,
    idx_labels,
    pixels,
    put,
    rows_of,
    small_chunks,
    survives,
)

from edgetrain.data.idx import IdxPair, open_idx
from edgetrain.errors import CorruptError, InputError

IMAGES, LABELS = pixels(20, 5, 4), cycle(20, 3)


def pair(folder, suffix="", images=None, labels=None):
    content = idx_images(IMAGES) if images is None else images
    answers = idx_labels(LABELS) if labels is None else labels
    return IdxPair(put(folder / "images", content, suffix), put(folder / "labels", answers, suffix))


def opened(found):
    return open_idx("tiny", found, found, 3)


@pytest.mark.parametrize("suffix", PACKERS)
def test_rows_are_those_written(tmp_path, monkeypatch, suffix):
    with small_chunks(monkeypatch, 60):  # three rows a chunk
        data = opened(pair(tmp_path, suffix))
        x, y = rows_of(data.train)
        again, _ = rows_of(data.train)
    assert (data.shape, data.pixel_max, data.input, data.classes) == ((1, 5, 4), 255.0, "image", 3)
    assert x.dtype == np.uint8
    assert np.array_equal(x[:, 0], IMAGES)
    assert np.array_equal(again, x)
    assert y.dtype == np.int64
    assert np.array_equal(y, LABELS)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize(("change", "message"), [(b"", "truncated"), (b"more", "trailing")])
def test_wrong_size_is_corrupt(tmp_path, suffix, change, message):
    content = idx_images(IMAGES)
    found = pair(tmp_path, suffix, images=content + change if change else content[:-7])
    with pytest.raises(CorruptError, match=message) as caught:
        rows_of(opened(found).train)
    assert f"images{suffix}" in str(caught.value)


def test_wrong_magic_says_what_was_expected(tmp_path):
    with pytest.raises(CorruptError, match="begins with 0x00000801, expected 0x00000803"):
        opened(pair(tmp_path, images=idx_labels(np.zeros(100))))


def test_label_count_must_be_the_image_count(tmp_path):
    with pytest.raises(InputError, match=r"19 labels, but .* has 20 images"):
        opened(pair(tmp_path, labels=idx_labels(LABELS[:-1])))


def test_label_out_of_range_names_the_row(tmp_path):
    with pytest.raises(InputError, match=r"row 19 has label 7, expected 0..2"):
        opened(pair(tmp_path, labels=idx_labels(np.append(LABELS[:-1], 7))))


def test_no_images_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="0 images"):
        opened(pair(tmp_path, images=idx_images(IMAGES[:0]), labels=idx_labels(LABELS[:0])))


def test_header_cannot_ask_for_any_memory(tmp_path):
    found = pair(tmp_path, ".gz", images=struct.pack(">4I", 0x803, 20, 1 << 31, 1 << 31))
    with pytest.raises(InputError, match="one row takes"):
        opened(found)


def test_train_and_test_must_be_alike(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    small = pair(other, images=idx_images(IMAGES[:, :4]))
    with pytest.raises(InputError, match=r"images are \(4, 4\)"):
        open_idx("tiny", pair(tmp_path), small, 3)


@fuzzing
@given(content=st.binary(max_size=100), answers=st.binary(max_size=40))
def test_random_bytes_raise_only_our_errors(tmp_path, content, answers):
    survives(lambda: opened(pair(tmp_path, images=content, labels=answers)))


@fuzzing
@given(data=st.data(), suffix=st.sampled_from(list(PACKERS)))
def test_damage_raises_only_our_errors(tmp_path, data, suffix):
    images = data.draw(damaged(idx_images(IMAGES), 16))
    answers = data.draw(damaged(idx_labels(LABELS), 8))
    survives(lambda: opened(pair(tmp_path, suffix, images, answers)))


def test_both_headers_lying_does_not_cost_memory(tmp_path):
    found = IdxPair(tmp_path / "images.gz", tmp_path / "labels.gz")
    found.images.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 1 << 25, 28, 28)))
    found.labels.write_bytes(gzip.compress(struct.pack(">2I", 0x801, 1 << 25)))
    with pytest.raises(CorruptError, match="truncated"):
        opened(found)
