"""Tensors in files, for what the host's memory may not hold."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from edgetrain.store.atomic import reserve, storage_errors


def mapped(path: Path, numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [numbers] whose memory is a file, which has no name any more: it goes with the tensor.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            reserve(descriptor, numbers * dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype)
        finally:
            os.close(descriptor)
            path.unlink()
