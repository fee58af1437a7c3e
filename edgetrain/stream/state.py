"""What a cell keeps between its visits: the tensors of its module, its head and its optimizers, apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

Tensors = dict[str, Tensor]
#: Phase, owner (``cell.linear.weight``, ``head.weight``) and key (``exp_avg``) of a tensor of an optimizer.
Slot = tuple[str, str, str]
#: A scope in which the meter takes tensors for the host's.
Host = Callable[[], AbstractContextManager[object]]


@dataclass
class CellState:
    """Named tensors of a cell; a tied tensor is there once.

    Attributes:
        module: parameters and persistent buffers of the cell's module.
        head: likewise, of its head.
        optimizer: what the optimizers of its phases keep, by phase, owner and key.
    """

    module: Tensors = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)
    optimizer: dict[Slot, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> CellState:
        """The same names with other tensors."""
        return CellState(
            {name: change(value) for name, value in self.module.items()},
            {name: change(value) for name, value in self.head.items()},
            {slot: change(value) for slot, value in self.optimizer.items()},
        )

    def stored(self, make: Callable[[Tensor], Tensor], room: CellState | None) -> CellState:
        """The values in the tensors of ``room`` where it has such, else in those that ``make`` gives."""
        if room is None:
            return self.map(make)
        return CellState(
            _stored(self.module, make, room.module),
            _stored(self.head, make, room.head),
            _stored(self.optimizer, make, room.optimizer),
        )

    def without_optimizer(self) -> CellState:
        """The weights alone."""
        return CellState(self.module, self.head)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        yield from self.module.values()
        yield from self.head.values()
        yield from self.optimizer.values()

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors())

    def to_kinds(self) -> dict[str, Tensors]:
        """As it is stored, by kind of file: ``weights``, named ``cell.*`` and ``head.*``, and ``optim``, if any."""
        kinds = {"weights": _prefixed("cell.", self.module) | _prefixed("head.", self.head)}
        if self.optimizer:
            kinds["optim"] = {".".join(slot): value for slot, value in self.optimizer.items()}
        return kinds

    @classmethod
    def of_kinds(cls, kinds: Mapping[str, Mapping[str, Tensor]]) -> CellState:
        """The state that ``to_kinds`` gave."""
        state = cls()
        for name, value in kinds.get("weights", {}).items():
            owner, _, rest = name.partition(".")
            (state.module if owner == "cell" else state.head)[rest] = value
        for name, value in kinds.get("optim", {}).items():
            phase, _, rest = name.partition(".")
            owner, _, key = rest.rpartition(".")
            state.optimizer[phase, owner, key] = value
        return state


_K = TypeVar("_K", str, Slot)


def _stored(tensors: dict[_K, Tensor], make: Callable[[Tensor], Tensor], room: dict[_K, Tensor]) -> dict[_K, Tensor]:
    found = {}
    for name, value in tensors.items():
        old = room.get(name)
        if value.ndim and old is not None and old.shape == value.shape and old.dtype == value.dtype:
            found[name] = old.copy_(value)
        else:
            found[name] = make(value)
    return found


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}
