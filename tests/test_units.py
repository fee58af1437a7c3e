"""Sizes and times as people read them. ``pytest tests/test_units.py``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.units import MIB, ceil_mb, from_mb, show_mb, show_seconds, to_mb

sizes = st.integers(0, 1 << 45)


def test_a_megabyte_is_a_mebibyte() -> None:
    assert to_mb(MIB) == 1.0
    assert from_mb(1) == 1 << 20


def test_the_unknown_stays_unknown() -> None:
    assert to_mb(None) is None
    assert show_mb(None) == "unknown"


@settings(derandomize=True, max_examples=200, deadline=None)
@given(size=sizes)
def test_rounding_up_wastes_less_than_a_hundredth_of_a_megabyte(size: int) -> None:
    assert (ceil_mb(size) - 0.01) * MIB <= size + 1


@settings(derandomize=True, max_examples=200, deadline=None)
@given(size=sizes)
def test_a_budget_of_the_stated_smallest_size_is_enough(size: int) -> None:
    """``plan`` prints ``ceil_mb(min_budget)``; typing it back must give at least that many bytes."""
    assert from_mb(ceil_mb(size)) >= size


@settings(derandomize=True, max_examples=100, deadline=None)
@given(size=sizes)
def test_megabytes_of_bytes_are_right_to_three_decimals(size: int) -> None:
    assert to_mb(size) == pytest.approx(size / MIB, abs=0.0005)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 KiB"), (512, "0.5 KiB"), (3 * MIB, "3.0 MiB"), (1500 * MIB, "1,500.0 MiB"), (20 << 30, "20.0 GiB")],
)
def test_sizes_are_shown_in_the_unit_that_suits(size: int, text: str) -> None:
    assert show_mb(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.2 s"), (59.9, "59.9 s"), (60, "1:00"), (185, "3:05"), (7385.9, "2:03:05")],
)
def test_times_are_shown_as_on_a_clock(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
