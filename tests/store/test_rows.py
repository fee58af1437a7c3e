"""Rows of latents as bytes and back. ``pytest tests/store/test_rows.py``."""

from __future__ import annotations

import math
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgetrain.store.rows import LATENT_DTYPES, RowFormat

fuzzing = settings(max_examples=100, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
rows = st.integers(1, 6)
moderate = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def arrays(dtype: str, elements: st.SearchStrategy | None = None) -> st.SearchStrategy[np.ndarray]:
    """Values [B, *shape]."""
    return st.tuples(rows, shapes).flatmap(lambda pair: hnp.arrays(dtype, (pair[0], *pair[1]), elements=elements))


def round_trip(values: np.ndarray, dtype: str) -> torch.Tensor:
    layout = RowFormat(values.shape[1:], dtype)
    encoded = layout.encode(torch.from_numpy(values))
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (values.shape[0], layout.row_bytes)
    decoded = layout.decode(encoded)
    assert decoded.dtype == layout.value_dtype
    return decoded


@fuzzing
@given(values=arrays("float32", st.floats(width=32)))
def test_float32_rows_come_back_bit_for_bit(values: np.ndarray) -> None:
    decoded = round_trip(values, "float32").numpy()
    nan = np.isnan(values)
    assert decoded.shape == values.shape
    assert np.array_equal(np.isnan(decoded), nan)
    assert np.array_equal(decoded[~nan].view(np.uint32), values[~nan].view(np.uint32))


@fuzzing
@given(values=arrays("float32", st.floats(width=32, allow_nan=False)))
def test_float16_rows_come_back_as_the_nearest_half(values: np.ndarray) -> None:
    decoded = round_trip(values, "float16").numpy()
    with np.errstate(over="ignore"):
        assert np.array_equal(decoded, values.astype(np.float16).astype(np.float32))


@fuzzing
@given(values=arrays("float32", st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)))
def test_bfloat16_rows_come_back_as_the_nearest_bfloat16(values: np.ndarray) -> None:
    decoded = round_trip(values, "bfloat16").numpy()
    assert not (decoded.view(np.uint32) & 0xFFFF).any()  # eight bits of mantissa
    bits = values.view(np.uint32).astype(np.int64)
    off = np.abs(decoded.view(np.uint32).astype(np.int64) - bits)
    assert (off <= 0x8000).all()


@fuzzing
@given(values=arrays("int64", st.integers(-(2**63), 2**63 - 1)))
def test_int64_rows_come_back_exactly(values: np.ndarray) -> None:
    assert np.array_equal(round_trip(values, "int64").numpy(), values)


@fuzzing
@given(values=arrays("int64", st.integers(-(2**31), 2**31 - 1)), dtype=st.sampled_from(["int64", "int32"]))
def test_tokens_take_four_bytes_and_come_back_as_int64(values: np.ndarray, dtype: str) -> None:
    encoded = RowFormat(values.shape[1:], "tokens").encode(torch.from_numpy(values.astype(dtype)))
    assert encoded.numpy().tobytes() == values.astype("<i4").tobytes()
    decoded = round_trip(values, "tokens")
    assert decoded.dtype == torch.int64
    assert np.array_equal(decoded.numpy(), values)


def worst_error(values: np.ndarray) -> np.ndarray:
    """Half a step of each row, what float32 rounds on the way, and what is too small for a step."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    low = np.minimum(flat.min(1), 0)
    step = (flat.max(1) - low) / 255
    return step / 2 + 4e-7 * (np.abs(low) + 255 * step) + 3e-36  # below 255 normal steps all is 0


@fuzzing
@given(values=arrays("float32", moderate))
def test_uint8_rows_are_off_by_at_most_half_a_step(values: np.ndarray) -> None:
    kept = values.copy()
    decoded = round_trip(values, "uint8").numpy()
    off = np.abs(decoded.astype(np.float64) - values).reshape(len(values), -1).max(1)
    assert (off <= worst_error(values)).all()
    assert np.array_equal(values, kept)  # the latents themselves are untouched


@fuzzing
@given(values=arrays("float32", st.sampled_from([0.0, 1.0, 2.5, 250.0])))
def test_uint8_keeps_zeros_exactly_where_nothing_is_negative(values: np.ndarray) -> None:
    decoded = round_trip(values, "uint8").numpy()
    assert (decoded[values == 0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 7.25, 1e6])
@pytest.mark.parametrize("elements", [1, 2, 9])
def test_constant_rows_survive_uint8(value: float, elements: int) -> None:
    decoded = round_trip(np.full((3, elements), value, np.float32), "uint8")
    assert torch.allclose(decoded, torch.full((3, elements), value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [-1.0, -7.25, -1e6])
def test_constant_negative_rows_survive_uint8_exactly(value: float) -> None:
    decoded = round_trip(np.full((2, 5), value, np.float32), "uint8")
    assert torch.equal(decoded, torch.full((2, 5), value))


def test_negative_rows_of_uint8_use_all_levels_down_to_the_least() -> None:
    values = np.linspace(-3, -1, 256, dtype=np.float32)[None]
    decoded = round_trip(values, "uint8").numpy()
    assert decoded.min() == -3
    assert np.abs(decoded - values).max() <= worst_error(values)[0]


def test_rows_of_uint8_do_not_disturb_each_other() -> None:
    small, large = np.full((1, 4), 1e-3, np.float32), np.full((1, 4), 1e5, np.float32)
    both = round_trip(np.concatenate([small, large]), "uint8")
    assert torch.equal(both[:1], round_trip(small, "uint8"))
    assert torch.equal(both[1:], round_trip(large, "uint8"))


def test_encoding_twice_loses_nothing_more() -> None:
    values = torch.rand(20, 33, generator=torch.Generator().manual_seed(0))
    layout = RowFormat((33,), "uint8")
    once = layout.decode(layout.encode(values))
    assert torch.allclose(layout.decode(layout.encode(once)), once, rtol=1e-6, atol=1e-7)


@fuzzing
@given(values=arrays("uint8"), pixel_max=st.sampled_from([1.0, 16.0, 255.0]))
def test_pixels_are_exact_bytes_over_their_maximum(values: np.ndarray, pixel_max: float) -> None:
    layout = RowFormat(values.shape[1:], "pixels", pixel_max)
    encoded = layout.encode(torch.from_numpy(values))
    assert encoded.shape == (len(values), layout.row_bytes)
    expected = values.astype(np.float32) / np.float32(pixel_max)
    assert np.array_equal(layout.decode(encoded).numpy(), expected)


@fuzzing
@given(shape=shapes, dtype=st.sampled_from([*LATENT_DTYPES, "pixels", "int64", "tokens"]))
def test_row_bytes_are_those_of_the_table(shape: tuple[int, ...], dtype: str) -> None:
    layout, n = RowFormat(shape, dtype), prod(shape)
    expected = {
        "float32": 4 * n,
        "float16": 2 * n,
        "bfloat16": 2 * n,
        "uint8": math.ceil((8 + n) / 4) * 4,
        "pixels": n,
        "int64": 8 * n,
        "tokens": 4 * n,
    }
    assert layout.elements == n
    assert layout.row_bytes == expected[dtype]


@pytest.mark.parametrize("dtype", LATENT_DTYPES)
@pytest.mark.parametrize("elements", [1, 3, 8, 13])
def test_any_run_of_rows_decodes_as_it_would_in_the_whole(dtype: str, elements: int) -> None:
    values = torch.randn(9, elements, generator=torch.Generator().manual_seed(1))
    layout = RowFormat((elements,), dtype)
    encoded = layout.encode(values)
    whole = layout.decode(encoded)
    for first, last in [(0, 9), (1, 4), (8, 9), (3, 3)]:
        assert torch.equal(layout.decode(encoded[first:last]), whole[first:last])


@pytest.mark.parametrize("dtype", LATENT_DTYPES)
def test_values_that_lie_scattered_in_memory_are_encoded_in_row_order(dtype: str) -> None:
    values = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(2)).permute(1, 2, 0)
    layout = RowFormat((5, 4), dtype)
    assert torch.equal(layout.encode(values), layout.encode(values.contiguous()))


def test_float32_decodes_without_a_copy() -> None:
    encoded = torch.zeros(3, 16, dtype=torch.uint8)
    decoded = RowFormat((2, 2)).decode(encoded)
    assert decoded.untyped_storage().data_ptr() == encoded.untyped_storage().data_ptr()
    assert decoded.shape == (3, 2, 2)


def test_a_row_of_one_number_has_an_empty_shape() -> None:
    layout = RowFormat((), "int64")
    labels = torch.tensor([3, -1, 2**62])
    assert layout.row_bytes == 8
    assert torch.equal(layout.decode(layout.encode(labels)), labels)


def test_an_unknown_dtype_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="unknown row dtype 'float8'"):
        RowFormat((3,), "float8")
