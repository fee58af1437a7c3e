"""How many CPU threads a parallel region of PyTorch really gets."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


def thread_limit() -> int | None:
    """The most threads that OpenMP gives a parallel region (``OMP_THREAD_LIMIT``); ``None``: unknown.

    PyTorch does not look at it: ``torch.get_num_threads`` may be larger.
    """
    openmp = _openmp()
    return None if openmp is None else int(openmp.omp_get_thread_limit())


@contextmanager
def fixed_team_size() -> Iterator[None]:
    """A scope in which OpenMP gives parallel regions no fewer threads on a busy machine (``OMP_DYNAMIC``)."""
    openmp = _openmp()
    if openmp is None:
        yield
        return
    before = openmp.omp_get_dynamic()
    openmp.omp_set_dynamic(0)
    try:
        yield
    finally:
        openmp.omp_set_dynamic(before)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch is linked with, found among the dependencies of PyTorch's own."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            library = ctypes.CDLL(str(path))
            library.omp_get_thread_limit.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return library
    return None
