"""A cell on the device: module, head and optimizers, and their state as named tensors.

Names of a cell's state: ``cell.linear.weight``, ``head.weight``, and for the optimizer
``optim.PHASE.cell.linear.weight.exp_avg``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgetrain.errors import InputError
from edgetrain.keys import seeded
from edgetrain.memory.timeline import making
from edgetrain.nets.copying import kept_in_eval, named_tensors, set_training, unsaved_buffers, with_tensors
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
_NAMED = 4  # tensors in a message


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
        if state is not None:
            self._check(state)
        with making("weights"):
            self.module, self.head = self._placed("cell", self.module, state), self._placed("head", self.head, state)
        self._frozen = kept_in_eval(self.module)
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
        """Everything that the cell will need on its next visit, as device tensors; a tied tensor once."""
        state = saved_tensors(self.module, self.head)
        names: dict[Tensor, str] = {value: name for name, value in self.parameters()}
        for phase, _, optimizer in self.phases:
            for parameter, values in optimizer.state.items():
                prefix = f"optim.{phase.name}.{names[parameter]}"
                state |= {f"{prefix}.{key}": value for key, value in values.items() if torch.is_tensor(value)}
        return {name: value.detach() for name, value in state.items()}

    def _placed(self, prefix: str, module: nn.Module | None, state: Mapping[str, Tensor] | None) -> Any:
        """The module on the device, with the state's values or, where there are none, its own."""
        known = state or {}
        place = partial(copied, device=self.device)
        return module and with_tensors(module, lambda name, own: place(known.get(f"{prefix}.{name}", own)))

    def _check(self, state: Mapping[str, Tensor]) -> None:
        """Compare a state's names, shapes and kinds with the module's and the head's.

        Raises:
            InputError: they differ.
        """
        expected = {name: _kind(value) for name, value in saved_tensors(self.module, self.head).items()}
        found = {name: _kind(value) for name, value in state.items() if not name.startswith("optim.")}
        if expected == found:
            return
        lacking, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        other = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
        parts = [
            f"no {_listed(lacking)}" if lacking else "",
            f"{_listed(unknown)}, which the net does not have" if unknown else "",
            f"{other[0]} as {found[other[0]]}, where the net has {expected[other[0]]}" if other else "",
        ]
        assert self.node.recipe is not None
        raise InputError(
            f"cell {self.node.index + 1} ({self.node.recipe.name}): the saved weights do not fit this net: they have"
            f" {'; '.join(filter(None, parts))}. Use the net that the run was trained with"
        )

    def _mode(self, training: bool) -> None:
        set_training(self.module, training, self._frozen)
        if self.head is not None:
            self.head.train(training)

    def _load_optimizers(self, state: Mapping[str, Tensor]) -> None:
        owners = {
            f"optim.{phase.name}.{name}": (parameter, optimizer)
            for phase, learned, optimizer in self.phases
            for name, parameter in self.parameters()
            if any(parameter is each for each in learned)
        }
        for name, value in state.items():
            owner, _, key = name.rpartition(".")
            if not name.startswith("optim."):
                continue
            if owner not in owners:
                raise InputError(f"cell {self.node.index + 1}: the saved optimizer has {name}, which this net does not")
            parameter, optimizer = owners[owner]
            # A step count of an implementation that is not fused is read by the host.
            on_host = value.ndim == 0 and not optimizer.defaults.get("fused")
            optimizer.state[parameter][key] = value.clone() if on_host else copied(value, self.device)


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
    found = saved_tensors(*(shapes or _modules(node, objective, known=False)))
    if shapes is None:
        return {name: value.detach() for name, value in found.items()}
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in found.items()}


def saved_tensors(module: nn.Module, head: nn.Module | None) -> State:
    """The tensors that are stored of a cell by name: all but buffers that are not persistent, a tied one once."""
    found: State = {}
    for prefix, top in (("cell", module), ("head", head)):
        if top is not None:
            unsaved = unsaved_buffers(top)
            found |= {f"{prefix}.{name}": value for name, value in named_tensors(top) if name not in unsaved}
    return found


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
    return any(unsaved_buffers(top) for top in modules if top is not None)


def _kind(value: Tensor) -> str:
    kind = "floats" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return f"{kind} {list(value.shape)}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
