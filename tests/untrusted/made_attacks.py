"""Untrusted input: damaged bytes, extreme numbers, odd words; and the allowed outcomes."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiers import examples

from edgetrain.errors import EdgetrainError

T = TypeVar("T")
MIB = 1 << 20
LONGEST_LINE = 2100  # characters of a message

#: Numbers that are at, below or beyond what counts and sizes can be.
_BITS = (7, 8, 15, 16, 24, 31, 32, 48, 60, 62, 63, 64)
NUMBERS = sorted({0, 2, 3, 7, *(sign * ((1 << bits) + by) for bits in _BITS for by in (-1, 0, 1) for sign in (1, -1))})


def fuzzing(count: int) -> settings:
    """Settings of a property that tries a tenth of ``count`` examples, and all in the slow tier."""
    return settings(
        max_examples=examples(max(1, count // 10)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def ours(call: Callable[[], T], name: str) -> T | None:
    """What the call gives; ``None`` where it raises an error of ours, which is one short line that holds ``name``."""
    try:
        return call()
    except EdgetrainError as error:
        line = str(error)
        assert error.exit_code in (2, 3, 4)
        assert line.isprintable()
        assert len(line) <= LONGEST_LINE
        assert name in line
        return None


def refused(call: Callable[[], object], kind: type[EdgetrainError], message: str, most: int = 4 * MIB) -> None:
    """The call ends in one line, and Python and numpy never held more than ``most`` bytes on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=message) as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is kind
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= LONGEST_LINE
    assert peak <= most


@st.composite
def damaged(draw: st.DrawFn, content: bytes, changes: int = 4) -> bytes:
    """``content`` after up to ``most`` changes: bytes, numbers, cuts, insertions, repetitions."""
    found = bytearray(content)
    for _ in range(draw(st.integers(0, changes))):
        draw(st.sampled_from(_CHANGES))(draw, found)
    return bytes(found)


def _at(draw: st.DrawFn, found: bytearray) -> int:
    """A place, often in the first or the last bytes, where headers and directories are."""
    size = len(found)
    low, high = draw(st.sampled_from([(0, size), (0, min(size, 64)), (max(0, size - 300), size)]))
    return draw(st.integers(low, high))


def _flip(draw: st.DrawFn, found: bytearray) -> None:
    at = _at(draw, found)
    if at < len(found):
        found[at] ^= 1 << draw(st.integers(0, 7))


def _set(draw: st.DrawFn, found: bytearray) -> None:
    at = _at(draw, found)
    found[at : at + 1] = bytes([draw(st.integers(0, 255))])


def _number(draw: st.DrawFn, found: bytearray) -> None:
    at, code = _at(draw, found), draw(st.sampled_from("BHIQ"))
    size = struct.calcsize(code)
    number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * size)
    found[at : at + size] = struct.pack(draw(st.sampled_from("<>")) + code, number)


def _digits(draw: st.DrawFn, found: bytearray) -> None:
    at = _at(draw, found)
    found[at:at] = str(draw(st.sampled_from(NUMBERS))).encode()


def _cut(draw: st.DrawFn, found: bytearray) -> None:
    del found[_at(draw, found) :]


def _delete(draw: st.DrawFn, found: bytearray) -> None:
    at = _at(draw, found)
    del found[at : at + draw(st.integers(1, 600))]


def _insert(draw: st.DrawFn, found: bytearray) -> None:
    at = _at(draw, found)
    found[at:at] = draw(st.binary(max_size=16))


def _splice(draw: st.DrawFn, found: bytearray) -> None:
    """Copy a piece to another place, over what is there or between."""
    start, at, size = _at(draw, found), _at(draw, found), draw(st.integers(1, 600))
    piece = found[start : start + size]
    found[at : at + len(piece) * draw(st.integers(0, 1))] = piece


_CHANGES = (_flip, _set, _number, _number, _digits, _cut, _delete, _insert, _splice)


def spliced(pieces: Sequence[str], most: int = 6) -> st.SearchStrategy[str]:
    """Texts of a grammar's pieces in any order."""
    return st.lists(st.sampled_from(list(pieces)), max_size=most).map("".join)


#: Values that no setting, header or journal expects; strings may hold surrogates and control characters.
odd_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from([1_000, -1_000, 20_000]).map(lambda bits: (1 << abs(bits)) * (bits // abs(bits)))
    | st.floats()
    | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def nested(depth: int, leaf: Any = 1) -> Any:
    """A list in a list in a list ..."""
    for _ in range(depth):
        leaf = [leaf]
    return leaf
