"""What a finished run writes for its user."""

from __future__ import annotations

import pytest
from machine import data, finished

from edgetrain.errors import CorruptError, InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("finished"), "mf")


def test_latents_of_a_damaged_cell_leave_an_earlier_file_as_it_was(run, tmp_path):
    cell = run.path / "cells" / "001.safetensors"
    content = cell.read_bytes()
    (tmp_path / "z.npy").write_bytes(b"earlier")
    try:
        cell.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CorruptError, match=r"001\.safetensors"):
            run.latents(data("pixels").raw, tmp_path / "z.npy")
    finally:
        cell.write_bytes(content)
    assert (tmp_path / "z.npy").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["z.npy"]


@pytest.mark.parametrize(("name", "why"), [("missing/z.npy", "missing does not exist"), ("", "is a folder")])
def test_latents_need_a_file_name_in_a_folder(run, tmp_path, name, why):
    with pytest.raises(InputError, match=why):
        run.latents("no such data", tmp_path / name)
