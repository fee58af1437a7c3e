"""What a cell keeps between its visits: the tensors of its module, its head and its optimizers, apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

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


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}
