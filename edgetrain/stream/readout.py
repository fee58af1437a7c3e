"""The classifier that is trained on all cells' latents, without ever concatenating them.

With latents z_l [B, n_l] of cells l and one linear map, cut into blocks C_l [C, n_l] and a bias c:

    S  = c + sum_l z_l C_l^T            first sweep over the cells, [B, C]
    D  = (softmax(S) - Y) / B           gradient of the mean cross-entropy
    dC_l = D^T z_l,  dc = sum_b D_b     second sweep

S is all that the sweeps share, so a step needs room for one block and one micro-batch of one cell's
latents, whatever the depth. This is the gradient of the linear map on the concatenation, exactly.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from edgetrain.keys import generator
from edgetrain.memory.meter import Meter
from edgetrain.memory.timeline import making
from edgetrain.store.latents import LatentFile, Rows
from edgetrain.stream.cell import Host, OptimizerRecipe, State, copied
from edgetrain.stream.executor import Tally
from edgetrain.stream.feed import Part, Slice, labels_of, picked
from edgetrain.stream.latents import DeviceLatents, FileLatents
from edgetrain.stream.prefetch import Prefetcher

_HOST = torch.device("cpu")
BIAS = "bias"


class Readout:
    """The classifier's blocks, on the device or streamed through it one by one.

    Args:
        widths: n_l of each cell.
        classes: C.
        optimizer: of every block; it works element by element, so blocks may have one each.
        device: where steps run.
        seed: the run's.
        meter: watches the device side.
        resident: keep all blocks on the device.
        state: named tensors ``N.weight``, ``bias`` and the optimizer's to start from.
    """

    def __init__(
        self,
        widths: list[int],
        classes: int,
        optimizer: OptimizerRecipe,
        device: torch.device,
        seed: int,
        meter: Meter,
        resident: bool,
        state: Mapping[str, Tensor] | None = None,
    ):
        self._widths, self._classes = widths, classes
        self._optimizer, self._device, self._meter, self._resident = optimizer, device, meter, resident
        names = [BIAS, *(f"{index}.weight" for index in range(len(widths)))]
        self._away: dict[str, State] = {}
        self._here: dict[str, _Block] = {}
        with meter.host():
            for name in names:
                self._away[name] = self._first(name, seed) if state is None else _part(state, name)
        if resident:
            for name in names:
                self._here[name] = _Block(self._away.pop(name), optimizer, device)

    def weight(self, name: str) -> Tensor:
        """A block's values on the device."""
        if name in self._here:
            return self._here[name].value.detach()
        with making("weights"):
            return copied(self._away[name]["value"], self._device)

    def update(self, name: str, gradient: Tensor) -> None:
        """One optimizer step of a block."""
        block = self._here.get(name) or _Block(self._away[name], self._optimizer, self._device)
        block.step(gradient)
        if name not in self._here:
            with self._meter.host():
                self._away[name] = {key: block.to_host(value) for key, value in block.state().items()}

    def state(self) -> State:
        """Everything as host tensors: ``NAME`` for values, ``optim.NAME.KEY`` for the optimizer's."""
        state: State = {}
        with self._meter.host():
            for name in [*self._here, *self._away]:
                held = self._here[name].state() if name in self._here else self._away[name]
                for key, value in held.items():
                    state[name if key == "value" else f"optim.{name}.{key}"] = copied(value, _HOST)
        return state

    def _first(self, name: str, seed: int) -> State:
        """Values as one linear map on the concatenation would draw them: uniform within 1/sqrt(inputs)."""
        bound = sum(self._widths) ** -0.5
        shape = (self._classes,) if name == BIAS else (self._classes, self._widths[int(name.partition(".")[0])])
        source = generator("cpu", seed, "readout", name)
        return {"value": torch.empty(shape).uniform_(-bound, bound, generator=source)}


class _Block:
    """One block on the device with its optimizer."""

    def __init__(self, state: Mapping[str, Tensor], optimizer: OptimizerRecipe, device: torch.device):
        with making("weights"):
            self.value = nn.Parameter(copied(state["value"], device))
        self._optimizer = optimizer.build([self.value])
        with making("optimizer state"):
            for key, value in state.items():
                if key != "value":
                    self._optimizer.state[self.value][key] = value if self._is_hosts(value) else copied(value, device)

    def step(self, gradient: Tensor) -> None:
        self.value.grad = gradient
        with making("optimizer state"):
            self._optimizer.step()
        self.value.grad = None

    def state(self) -> State:
        return {"value": self.value.detach(), **self._optimizer.state[self.value]}

    def to_host(self, value: Tensor) -> Tensor:
        """A copy for the host; a step count that the host keeps anyway is handed over as it is."""
        return value if self._is_hosts(value) else copied(value, _HOST)

    def _is_hosts(self, value: Tensor) -> bool:
        """Implementations that are not fused keep and read their step count on the host."""
        return value.ndim == 0 and not self._optimizer.defaults.get("fused")


def _part(state: Mapping[str, Tensor], name: str) -> State:
    prefix = f"optim.{name}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {"value": state[name], **own}


def flattened(z: Tensor) -> Tensor:
    """Latents [B, ...] as they are, [B, n]."""
    return z.flatten(1)


@dataclass
class Portion:
    """One micro-batch of one cell's features, [B, n]: rows ``first``..``last`` of a step's batch."""

    first: int
    last: int
    z: Tensor
    y: Tensor


@dataclass(frozen=True)
class Reading:
    """What the classifier reads of a cell's latents.

    Attributes:
        stream: the one that it reads.
        features: makes [B, n] of the stream's decoded rows [B, ...].
    """

    stream: str = "x"
    features: Callable[[Tensor], Tensor] = flattened

    def portion(self, first: int, last: int, rows: Tensor, y: Tensor) -> Portion:
        """What the classifier sees of a cell's decoded rows [B, ...] with labels [B]."""
        with making("latents"):
            return Portion(first, last, self.features(rows), y)


_PLAIN = Reading()


class CellsFeed(Protocol):
    """Gives the latents of one cell after the other, for each step and sweep."""

    waited_s: float

    def portions(self, work: Slice, sweeps: int) -> Iterator[Portion]:
        """For each step, sweep, cell and micro-batch, in that nesting."""
        ...


class FileCellsFeed:
    """Latents of all cells in files; a thread reads ahead, one cell's batch at a time."""

    def __init__(
        self,
        cells: list[FileLatents],
        labels: LatentFile,
        device: torch.device,
        host: Host,
        depth: int = 2,
        reading: Reading = _PLAIN,
    ):
        self.waited_s = 0.0
        self._files = [(cell.files[reading.stream], cell.step_order) for cell in cells]
        self._labels, self._device, self._host, self._depth = labels, device, host, depth
        self._reading = reading

    def portions(self, work: Slice, sweeps: int) -> Iterator[Portion]:
        """See ``CellsFeed``."""
        free: queue.Queue[tuple[Tensor, Tensor] | None] = queue.Queue()
        for _ in range(self._depth + 2):
            free.put(self._buffers(min(work.batch_size, work.rows)))
        for file in (*(file for file, _ in self._files), self._labels):
            file.distrust()
        with Prefetcher(lambda: self._gather(work, sweeps, free), self._depth) as batches:
            try:
                yield from self._transfer(work, batches, free)
            finally:
                free.put(None)
                self.waited_s += batches.waited_s

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        widest = max(file.format.row_bytes for file, _ in self._files)
        pinned = self._device.type == "cuda"
        with self._host():
            z = torch.empty(rows * widest, dtype=torch.uint8, pin_memory=pinned)
            y = torch.empty(rows, 8, dtype=torch.uint8, pin_memory=pinned)
        return z, y

    def _gather(
        self, work: Slice, sweeps: int, free: queue.Queue[tuple[Tensor, Tensor] | None]
    ) -> Iterator[tuple[int, int, tuple[Tensor, Tensor]]]:
        for _, start, stop in work.steps():
            for _ in range(sweeps):
                for index, (file, step_order) in enumerate(self._files):
                    if (buffers := free.get()) is None:
                        return
                    self._read(work, start, stop, file, step_order, buffers)
                    yield index, stop - start, buffers

    def _read(
        self, work: Slice, start: int, stop: int, file: LatentFile, step_order: bool, buffers: tuple[Tensor, Tensor]
    ) -> None:
        size = stop - start
        z = buffers[0][: size * file.format.row_bytes].view(size, file.format.row_bytes)
        file.read(work.source_rows(start, stop, step_order), z)
        labelled: Rows = slice(start, stop) if work.order is None else work.order[start:stop]
        self._labels.read(labelled, buffers[1][:size])

    def _transfer(
        self,
        work: Slice,
        batches: Prefetcher[tuple[int, int, tuple[Tensor, Tensor]]],
        free: queue.Queue[tuple[Tensor, Tensor] | None],
    ) -> Iterator[Portion]:
        slots = Slots([file.format.row_bytes for file, _ in self._files], work.micro_batch, self._device)
        for index, size, buffers in batches:
            layout = self._files[index][0].format
            rows = buffers[0][: size * layout.row_bytes].view(size, layout.row_bytes)
            for _, first, last, _ in work.parts(size):
                with making("latents"):
                    z = layout.decode(slots.view(last - first, layout.row_bytes).copy_(rows[first:last]))
                    y = self._labels.format.decode(slots.view_labels(last - first).copy_(buffers[1][first:last]))
                yield self._reading.portion(first, last, z, y)
                del z
            free.put(buffers)


class Slots:
    """Room on the device for one micro-batch of any cell's rows, and its labels."""

    def __init__(self, row_bytes: list[int], rows: int, device: torch.device):
        with making("latents"):
            self._z = torch.empty(rows * max(row_bytes), dtype=torch.uint8, device=device)
            self._y = torch.empty(rows, 8, dtype=torch.uint8, device=device)

    def view(self, rows: int, row_bytes: int) -> Tensor:
        """Room for rows [rows, row_bytes]."""
        return self._z[: rows * row_bytes].view(rows, row_bytes)

    def view_labels(self, rows: int) -> Tensor:
        """Room for labels' bytes [rows, 8]."""
        return self._y[:rows]


class DeviceCellsFeed:
    """Latents of all cells on the device."""

    def __init__(self, cells: list[DeviceLatents], labels: Tensor, reading: Reading = _PLAIN):
        self.waited_s = 0.0
        self._cells, self._labels, self._reading = cells, labels, reading

    def portions(self, work: Slice, sweeps: int) -> Iterator[Portion]:
        """See ``CellsFeed``."""
        for _, start, stop in work.steps():
            for _ in range(sweeps):
                for cell in self._cells:
                    for _, first, last, _ in work.parts(stop - start):
                        yield self._portion(cell, work, start, first, last)

    def _portion(self, cell: DeviceLatents, work: Slice, start: int, first: int, last: int) -> Portion:
        stream = self._reading.stream
        with making("latents"):
            rows = picked(cell.tensors[stream], work.source_rows(start + first, start + last, cell.step_order))
            y = labels_of(self._labels, work, start + first, start + last)
            return self._reading.portion(first, last, cell.formats[stream].decode(rows), y)


def train_readout(
    readout: Readout,
    feed: CellsFeed,
    work: Slice,
    cells: int,
    classes: int,
    meter: Meter,
    tally: Tally,
    pause: Callable[[int], bool] = lambda step: False,
) -> int:
    """Train the classifier on a range of steps.

    Args:
        readout: the classifier.
        feed: of the cells' latents.
        work: the steps.
        cells: how many it reads.
        classes: C.
        meter: watches the device side.
        tally: takes losses.
        pause: asked after each step, given its number, whether to end before the next.

    Returns:
        One behind the last step that was done.
    """
    portions = feed.portions(work, sweeps=2)
    try:
        for step, start, stop in work.steps():
            with meter.watch(("readout", stop - start)), torch.no_grad():
                _step(readout, portions, work, step, stop - start, cells, classes, tally)
            if pause(step):
                return step + 1
    finally:
        portions.close()  # type: ignore[attr-defined]
    return work.last


def _step(
    readout: Readout,
    portions: Iterator[Portion],
    work: Slice,
    step: int,
    size: int,
    cells: int,
    classes: int,
    tally: Tally,
) -> None:
    bias = readout.weight(BIAS)
    with making("activations"):
        y = torch.empty(size, dtype=torch.int64, device=bias.device)
        statistic = bias.expand(size, classes).contiguous()  # S, [B, C]
    for index in range(cells):
        block = readout.weight(f"{index}.weight")
        for _ in work.parts(size):
            portion = next(portions)
            statistic[portion.first : portion.last].addmm_(portion.z, block.T)
            y[portion.first : portion.last] = portion.y
            del portion
        del block
    with making("activations"):
        loss = cross_entropy(statistic, y, reduction="sum")
    tally.add(Part(step, 0, 0, size, 0, size, True, {}, y), loss, statistic)
    with making("gradients"):
        error = (statistic.softmax(1) - one_hot(y, classes)) / size  # D, [B, C]
    readout.update(BIAS, error.sum(0))
    for index in range(cells):
        gradient: Tensor | None = None
        for _ in work.parts(size):
            portion = next(portions)
            if gradient is None:
                with making("gradients"):
                    gradient = error.new_zeros(classes, prod(portion.z.shape[1:]))
            gradient.addmm_(error[portion.first : portion.last].T, portion.z)
            del portion
        assert gradient is not None
        readout.update(f"{index}.weight", gradient)
