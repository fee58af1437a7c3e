"""A cell on the device: module, head and optimizers, and their state as named tensors.

Names of a cell's state: ``cell.linear.weight``, ``head.weight``, and for the optimizer
``optim.PHASE.cell.linear.weight.exp_avg``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetrain.errors import InputError
from edgetrain.keys import seeded
from edgetrain.memory.timeline import making
from edgetrain.objectives.base import Node, Objective, Phase

State = dict[str, Tensor]
Modules = tuple[nn.Module, nn.Module | None]
Host = Callable[[], AbstractContextManager[object]]

# Fused implementations keep no temporary copies of all gradients; where there is none, one tensor
# after the other peaks lower than foreach, which is CUDA's default.
_OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamax": (torch.optim.Adamax, {"foreach": False}),
    "sgd": (torch.optim.SGD, {"fused": True}),
}
OPTIMIZERS = tuple(_OPTIMIZERS)


@dataclass(frozen=True)
class OptimizerRecipe:
    """Name, learning rate and weight decay of an optimizer."""

    name: str
    lr: float
    weight_decay: float = 0.0

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, in the implementation that peaks lowest.

        Raises:
            InputError: unknown name.
        """
        if self.name not in _OPTIMIZERS:
            raise InputError(f"unknown optimizer {self.name!r}; expected one of {', '.join(OPTIMIZERS)}")
        kind, implementation = _OPTIMIZERS[self.name]
        return kind(parameters, lr=self.lr, weight_decay=self.weight_decay, **implementation)  # type: ignore[call-arg]


class LiveCell:
    """One cell on the device.

    Args:
        node: which cell.
        objective: makes the head and names the phases.
        optimizer: for each phase.
        device: where everything goes.
        state: named host tensors to start from; ``None``: first weights, drawn from the cell's key.
        host: the meter's scope for host tensors.
        shapes: cell and head on the meta device, to be given room but no values (a dry run).
    """

    def __init__(
        self,
        node: Node,
        objective: Objective,
        optimizer: OptimizerRecipe,
        device: torch.device,
        state: Mapping[str, Tensor] | None = None,
        host: Host = nullcontext,
        shapes: Modules | None = None,
    ):
        self.node, self.device = node, device
        with host():
            self.module, self.head = shapes or _modules(node, objective, known=state is not None)
        with making("weights"):
            for name, owner, leaf in _slots(self.module, self.head):
                _place(owner, leaf, device, None if state is None else state.get(name))
        self.phases: list[tuple[Phase, list[nn.Parameter], torch.optim.Optimizer]] = []
        for phase in objective.phases:
            learned = [value for name, value in self.parameters() if phase.parameters(name)]
            learned = [value for value in learned if value.requires_grad]
            self.phases.append((phase, learned, optimizer.build(learned)) if learned else (phase, [], _NOTHING))
        if state is not None:
            with making("optimizer state"):
                self._load_optimizers(state)

    @property
    def tiles(self) -> int:
        """In how many pieces it comes to the device."""
        return 1

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Learned tensors with their names, those of the head after the cell's."""
        yield from ((f"cell.{name}", value) for name, value in self.module.named_parameters())
        if self.head is not None:
            yield from ((f"head.{name}", value) for name, value in self.head.named_parameters())

    def train(self) -> None:
        """Put cell and head in training mode."""
        self._mode(True)

    def eval(self) -> None:
        """Put cell and head in evaluation mode."""
        self._mode(False)

    def state(self) -> State:
        """Everything that the cell will need on its next visit, as device tensors."""
        state = {f"cell.{name}": value for name, value in self.module.state_dict().items()}
        if self.head is not None:
            state |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        names: dict[Tensor, str] = {value: name for name, value in self.parameters()}
        for phase, _, optimizer in self.phases:
            for parameter, values in optimizer.state.items():
                prefix = f"optim.{phase.name}.{names[parameter]}"
                state |= {f"{prefix}.{key}": value for key, value in values.items() if torch.is_tensor(value)}
        return {name: value.detach() for name, value in state.items()}

    def _mode(self, training: bool) -> None:
        self.module.train(training)
        if self.head is not None:
            self.head.train(training)

    def _load_optimizers(self, state: Mapping[str, Tensor]) -> None:
        parameters = dict(self.parameters())
        for phase, _, optimizer in self.phases:
            for name, parameter in parameters.items():
                prefix = f"optim.{phase.name}.{name}."
                for key, value in state.items():
                    if key.startswith(prefix):
                        # A step count of an implementation that is not fused is read by the host.
                        on_host = value.ndim == 0 and not optimizer.defaults.get("fused")
                        own = value.clone() if on_host else copied(value, self.device)
                        optimizer.state[parameter][key.removeprefix(prefix)] = own


_NOTHING: Any = type("NoOptimizer", (), {"state": {}, "step": lambda self: None, "defaults": {}})()


def copied(source: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``, also where source lies there already: on a CPU run the two sides differ.

    A source on the meta device has no values; the copy then has none either.
    """
    target = torch.empty(source.shape, dtype=source.dtype, device=device)
    to_gpu = device.type == "cuda"  # the other way a copy that does not wait could be read too early
    return target if source.is_meta else target.copy_(source.detach(), non_blocking=to_gpu)


def shapes_of(node: Node, objective: Objective) -> Modules:
    """Cell and head on the meta device."""
    assert node.recipe is not None
    with torch.device("meta"):
        return node.recipe.build(), objective.head(node)


def first_state(node: Node, objective: Objective, shapes: Modules | None = None) -> State:
    """Named host tensors of a cell's first weights and head; of ``shapes``, room without values."""
    module, head = shapes or _modules(node, objective, known=False)
    found = {f"cell.{name}": value for name, value in module.state_dict(keep_vars=True).items()}
    if head is not None:
        found |= {f"head.{name}": value for name, value in head.state_dict(keep_vars=True).items()}
    if shapes is None:
        return {name: value.detach() for name, value in found.items()}
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in found.items()}


def _modules(node: Node, objective: Objective, known: bool) -> Modules:
    """Cell and head: shapes alone where values come from elsewhere, first values otherwise."""
    assert node.recipe is not None
    if known and not unstored(shapes := shapes_of(node, objective)):
        return shapes
    module = node.recipe.materialise(node.seed, node.index)
    with seeded(node.seed, "head", node.index):
        return module, objective.head(node)


def unstored(modules: Modules) -> bool:
    """Whether a module has buffers that no state holds, so that they must be made anew."""
    return any(part._non_persistent_buffers_set for top in modules if top for part in top.modules())


def _slots(module: nn.Module, head: nn.Module | None) -> Iterator[tuple[str, nn.Module, str]]:
    """(qualified name, owner, leaf) of every parameter and buffer."""
    for prefix, top in (("cell", module), ("head", head)):
        if top is None:
            continue
        for path, owner in top.named_modules():
            for leaf in [*owner._parameters, *owner._buffers]:
                if getattr(owner, leaf) is not None:
                    yield ".".join(filter(None, (prefix, path, leaf))), owner, leaf


def _place(owner: nn.Module, leaf: str, device: torch.device, value: Tensor | None) -> None:
    """Put a parameter or buffer on the device, with ``value`` if there is one."""
    current = getattr(owner, leaf)
    moved = copied(current if value is None else value, device)
    if isinstance(current, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(moved, requires_grad=current.requires_grad)
    else:
        owner._buffers[leaf] = moved
