"""A cell on the device: its module, its head, and an optimizer for each phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgetrain.errors import InputError
from edgetrain.keys import seeded
from edgetrain.memory import queues
from edgetrain.memory.timeline import making
from edgetrain.nets.copying import kept_in_eval, named_tensors, set_training, unsaved_buffers, with_tensors
from edgetrain.nets.memory_format import convolution_weights, to_channels_last
from edgetrain.objectives.base import Batch as Shown
from edgetrain.objectives.base import Node, Objective, Phase, Streams
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.stream.outputs import Outputs
from edgetrain.stream.reader import Batch, MicroBatch
from edgetrain.stream.saved import saved_on_host
from edgetrain.stream.state import CellState, Host, Tensors

Modules = tuple[nn.Module, nn.Module | None]

_NAMED = 4  # tensors in a message
_HOST = torch.device("cpu")


class Learner(Protocol):
    """What the executor trains: a cell, or a whole net whose layers are streamed.

    Attributes:
        index: its number among the nodes of the schedule.
    """

    index: int

    @property
    def train_reads(self) -> Sequence[int]:
        """Numbers of its sources in the order in which ``train_step`` reads them: a hint."""
        ...

    def set_training(self, training: bool) -> None:
        """Put it in training mode, or in evaluation mode."""
        ...

    def train_step(self, batch: Batch, out: Outputs) -> None:
        """One step of the optimizer; latents that it emits are from before the update."""
        ...

    def learned(self) -> Iterator[Tensor]:
        """The tensors that it learns, if they are on the device."""
        ...


class Cell(Learner, Protocol):
    """A cell whole on the device, in tiles, or the classifier."""

    @property
    def tiles(self) -> int:
        """Number of tiles in which it is trained."""
        ...

    @property
    def reads(self) -> Sequence[int]:
        """Numbers of its sources in the order in which ``emit`` and ``evaluate`` read them: a hint."""
        ...

    def emit(self, batch: Batch, out: Outputs) -> None:
        """Latents of a batch."""
        ...

    def evaluate(self, batch: Batch, out: Outputs) -> None:
        """Scores and latents of a batch whose classes are looked for."""
        ...

    def state_dict(self, room: CellState | None = None) -> CellState:
        """All that it needs at its next visit, as host tensors.

        ``room``: host tensors that may be overwritten instead of making others.
        """
        ...


@dataclass(frozen=True)
class Setup:
    """What cells are built with.

    Attributes:
        objective: the local rule.
        optimizer: of each phase.
        device: where cells are.
        host: the meter's scope for host tensors.
    """

    objective: Objective
    optimizer: OptimizerRecipe
    device: torch.device
    host: Host = nullcontext


class ResidentCell:
    """A cell that is whole on the device.

    Args:
        node: which cell.
        setup: what it is built with.
        state: host tensors to start from; ``None``: first weights, drawn from the cell's key.
        shapes: cell and head without values where values come from ``state`` or, in a dry run, are not needed.

    Raises:
        InputError: the state's names, shapes or kinds are not those of cell and head.
    """

    tiles = 1
    reads: Sequence[int] = (0,)

    def __init__(self, node: Node, setup: Setup, state: CellState | None = None, shapes: Modules | None = None):
        self.node, self.index, self._setup = node, node.index, setup
        with setup.host():
            self.module, self.head = shapes or _modules(node, setup.objective, known=state is not None)
        if state is not None:
            self._check(state)
        with making("weights"):
            order = node.channels_last
            self.module = placed(self.module, None if state is None else state.module, setup.device, order)
            if self.head is not None:
                self.head = placed(self.head, None if state is None else state.head, setup.device, order)
        self._frozen = kept_in_eval(self.module)
        self.phases = [self._phase(phase) for phase in setup.objective.phases]
        self.train_reads = (0,) * len(self.phases)
        if state is not None:
            with making("optimizer state"):
                self._load_optimizers(state)

    def set_training(self, training: bool) -> None:
        """See ``Cell``."""
        set_training(self.module, training, self._frozen)
        if self.head is not None:
            self.head.train(training)

    def train_step(self, batch: Batch, out: Outputs) -> None:
        """See ``Cell``: forward, loss and backward of each micro-batch, then the update, for each phase."""
        if self.node.recipe.draws:
            batch.draws.seed_global(self._setup.device)
        for number, (phase, learned, optimizer) in enumerate(self.phases):
            for micro in batch.micro_batches():
                self._backward(phase.name, learned, batch, micro, out if number == 0 else Outputs())
            self.update(learned, optimizer, batch.number)

    def emit(self, batch: Batch, out: Outputs) -> None:
        """See ``Cell``."""
        for micro in batch.micro_batches():
            with making("latents"):
                out.latents(micro.start, self._setup.objective.latent(self.module, self._read(micro).streams))

    def evaluate(self, batch: Batch, out: Outputs) -> None:
        """See ``Cell``."""
        for micro in batch.micro_batches():
            self._evaluate(micro, out)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Learned tensors with their names, those of the head after the cell's."""
        yield from ((f"cell.{name}", value) for name, value in self.module.named_parameters())
        if self.head is not None:
            yield from ((f"head.{name}", value) for name, value in self.head.named_parameters())

    def learned(self) -> Iterator[Tensor]:
        """See ``Cell``."""
        return (value for _, learned, _ in self.phases for value in learned)

    def state_dict(self, room: CellState | None = None) -> CellState:
        """See ``Cell``."""
        with self._setup.host():
            return self.state().stored(_on_host, room)

    def state(self) -> CellState:
        """The cell's own tensors, on the device."""
        names: dict[Tensor, str] = {value: name for name, value in self.parameters()}
        optimizer = {
            (phase.name, names[parameter], key): value
            for phase, _, each in self.phases
            for parameter, values in each.state.items()
            for key, value in values.items()
            if torch.is_tensor(value)
        }
        state = CellState(saved_tensors(self.module), saved_tensors(self.head), optimizer)
        return state.map(lambda value: value.detach())

    def update(self, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
        """Step number ``step`` of an optimizer; the gradients are then freed."""
        self._setup.optimizer.prepare(learned, optimizer, step)
        with making("optimizer state"):
            optimizer.step()
        for parameter in learned:
            parameter.grad = None

    def _backward(self, phase: str, learned: list[nn.Parameter], batch: Batch, micro: MicroBatch, out: Outputs) -> None:
        shown = self._read(micro)
        with making("activations"), self._saving():
            step = self._setup.objective.loss(phase, self.module, self.head, shown)
        if out.takes_latents:
            out.latents(micro.start, self._clean(shown.streams) if step.emitted is None else step.emitted)
        out.loss(batch.step, step.loss, step.scores, shown.y)
        if learned:
            with making("gradients"):
                (step.loss / batch.size).backward(inputs=learned)  # type: ignore[no-untyped-call]

    def _evaluate(self, micro: MicroBatch, out: Outputs) -> None:
        with making("latents"):
            latents, scores = self._setup.objective.read(self.module, self.head, self._read(micro).streams)
        out.latents(micro.start, latents)
        out.scores(micro.start, scores, latents)

    def _read(self, micro: MicroBatch) -> Shown:
        """What the objective is shown of a micro-batch, images in the order in which the cell computes."""
        shown = micro.read()
        if not self.node.channels_last:
            return shown
        with making("latents"):
            return replace(shown, streams={name: to_channels_last(value) for name, value in shown.streams.items()})

    def _clean(self, streams: Streams) -> Streams:
        """Latents of clean inputs, from the weights before the update."""
        with torch.no_grad(), making("latents"):
            return self._setup.objective.latent(self.module, streams)

    def _saving(self) -> AbstractContextManager[object]:
        if not self._setup.objective.saves_on_host:
            return nullcontext()
        return saved_on_host(self._setup.device, self._setup.host, (value for _, value in self.parameters()))

    def _phase(self, phase: Phase) -> tuple[Phase, list[nn.Parameter], torch.optim.Optimizer]:
        learned = [value for name, value in self.parameters() if phase.parameters(name) and value.requires_grad]
        return phase, learned, self._setup.optimizer.build(learned) if learned else _NOTHING

    def _check(self, state: CellState) -> None:
        """Compare a state's names, shapes and kinds with the module's and the head's.

        Raises:
            InputError: they differ.
        """
        own = CellState(saved_tensors(self.module), saved_tensors(self.head))
        expected = {name: _kind(value) for name, value in own.to_kinds()["weights"].items()}
        found = {name: _kind(value) for name, value in state.to_kinds()["weights"].items()}
        if expected == found:
            return
        lacking, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        other = [name for name in sorted(expected.keys() & found.keys()) if expected[name] != found[name]]
        differences = [
            f"no {_listed(lacking)}" if lacking else "",
            f"{_listed(unknown)}, which the net does not have" if unknown else "",
            f"{other[0]} as {found[other[0]]}, where the net has {expected[other[0]]}" if other else "",
        ]
        raise InputError(
            f"cell {self.index + 1} ({self.node.recipe.name}): the saved weights do not fit this net: they have"
            f" {'; '.join(filter(None, differences))}. Use the net that the run was trained with"
        )

    def _load_optimizers(self, state: CellState) -> None:
        owners = {
            (phase.name, name): (parameter, optimizer)
            for phase, learned, optimizer in self.phases
            for name, parameter in self.parameters()
            if any(parameter is each for each in learned)
        }
        for (phase_name, owner, key), value in state.optimizer.items():
            if (phase_name, owner) not in owners:
                raise InputError(
                    f"cell {self.index + 1}: the saved optimizer of phase {phase_name} has {owner}, which this net"
                    " does not"
                )
            parameter, optimizer = owners[phase_name, owner]
            # A step count of an implementation that is not fused is read by the host.
            on_host = value.ndim == 0 and not optimizer.defaults.get("fused")
            like = parameter if value.shape == parameter.shape else value
            optimizer.state[parameter][key] = value.clone() if on_host else copied(value, self._setup.device, like)


_NOTHING: Any = type("NoOptimizer", (), {"state": {}, "step": lambda self: None, "defaults": {}, "param_groups": []})()


def copied(source: Tensor, device: torch.device, like: Tensor | None = None) -> Tensor:
    """A copy on ``device``, also where the source is there already: on a CPU run the two sides differ.

    A source on the meta device has no values; the copy then has none either. In memory it is in the order of ``like``,
    a tensor of the same shape, or contiguous.
    """
    if like is None:
        target = torch.empty(source.shape, dtype=source.dtype, device=device)
    else:
        target = torch.empty_like(like, dtype=source.dtype, device=device, requires_grad=False)
    # The other way, a copy that does not wait could be read too early.
    return target if source.is_meta else target.copy_(source.detach(), non_blocking=queues.copies_async(device))


def _on_host(value: Tensor) -> Tensor:
    # Counts keep their value in a dry run only this way, and optimizers that are not fused read them.
    return value.clone().to(_HOST) if value.ndim == 0 else copied(value, _HOST)


def placed(
    module: nn.Module, tensors: Mapping[str, Tensor] | None, device: torch.device, channels_last: bool = False
) -> nn.Module:
    """A copy of a module on the device, with the values of ``tensors`` where it names them, else its own.

    ``channels_last``: the weights of its convolutions are in that order.
    """
    known = tensors or {}
    weights = convolution_weights(module) if channels_last else set()

    def copy(name: str, own: Tensor) -> Tensor:
        source = known.get(name, own)
        return copied(source, device, to_channels_last(own) if id(own) in weights else None)

    return with_tensors(module, copy)


def shapes_of(node: Node, objective: Objective) -> Modules:
    """Cell and head on the meta device."""
    with torch.device("meta"):
        return node.recipe.build(), objective.head(node)


def first_state(node: Node, objective: Objective, shapes: Modules | None = None) -> CellState:
    """Host tensors of a cell's first weights and head; of ``shapes``, room without values."""
    module, head = shapes or _modules(node, objective, known=False)
    found = CellState(saved_tensors(module), saved_tensors(head))
    if shapes is None:
        return found.map(lambda value: value.detach())
    return found.map(lambda value: torch.empty(value.shape, dtype=value.dtype))


def saved_tensors(module: nn.Module | None) -> Tensors:
    """The tensors of a module that are stored: all but buffers that are not persistent, a tied one once."""
    if module is None:
        return {}
    unsaved = unsaved_buffers(module)
    return {name: value for name, value in named_tensors(module) if name not in unsaved}


def unstored(modules: Modules) -> bool:
    """Whether a module has buffers that no state holds, so that they must be made anew."""
    return any(unsaved_buffers(top) for top in modules if top is not None)


def _modules(node: Node, objective: Objective, known: bool) -> Modules:
    """Cell and head: shapes alone where values come from elsewhere, first values otherwise."""
    if known and not unstored(shapes := shapes_of(node, objective)):
        return shapes
    module = node.recipe.materialise(node.seed, node.index)
    with seeded(node.seed, "head", objective.head_index(node)):
        return module, objective.head(node)


def _kind(value: Tensor) -> str:
    kind = "floats" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return f"{kind} {list(value.shape)}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
