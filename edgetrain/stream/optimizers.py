"""Optimizers of cells: which one, at which learning rate, and how gradients are clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgetrain.config import did_you_mean
from edgetrain.errors import InputError, shown

# Fused implementations keep no temporary copies of all gradients; where there is none, one tensor
# after the other peaks lower than foreach, which is CUDA's default.
_OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adamax": (torch.optim.Adamax, {"foreach": False}),
    "sgd": (torch.optim.SGD, {"fused": True}),
}
OPTIMIZERS = tuple(_OPTIMIZERS)
SCHEDULES = ("constant", "cosine", "one-cycle", "step", "linear-warmup")
_RISE, _START, _END = 0.3, 1 / 25, 1 / 25e4  # of one-cycle, as in PyTorch: share of the steps, factors of the rate
_WARMUP = 0.1  # share of the steps
_DECAY = 0.1  # of step, at each of its epochs


@dataclass(frozen=True)
class LearningRate:
    """How the learning rate changes over the optimizer steps of a cell.

    Attributes:
        kind: one of ``SCHEDULES``.
        epochs: of ``step``: the rate is multiplied by ``decay`` after each of these epochs.
        decay: of ``step``.
        warmup: of ``linear-warmup``: the share of the steps in which the rate rises.
    """

    kind: str = "constant"
    epochs: tuple[int, ...] = ()
    decay: float = _DECAY
    warmup: float = _WARMUP

    @classmethod
    def parse(cls, text: str) -> LearningRate:
        """``constant``, ``cosine``, ``one-cycle``, ``step:30,60[:0.1]`` or ``linear-warmup[:0.1]``.

        Raises:
            InputError: it is none of these.
        """
        kind, _, rest = text.partition(":")
        try:
            if kind == "step":
                epochs, _, decay = rest.partition(":")
                return cls(kind, _epochs(epochs), _share(decay, _DECAY))
            if kind == "linear-warmup":
                return cls(kind, warmup=_share(rest, _WARMUP))
            if kind in SCHEDULES and not rest:
                return cls(kind)
        except ValueError:
            pass
        expected = "constant, cosine, one-cycle, step:EPOCH,...[:FACTOR] or linear-warmup[:SHARE]"
        hint = "" if kind in SCHEDULES else did_you_mean(kind, SCHEDULES)
        raise InputError(f"--lr-schedule {shown(text)}: expected {expected}{hint}")

    def factor(self, step: int, steps: int, epochs: int) -> float:
        """By what the learning rate is multiplied.

        Args:
            step: steps that the cell has done.
            steps: steps of the whole run.
            epochs: of the whole run.
        """
        if self.kind == "cosine":  # I. Loshchilov, F. Hutter: SGDR, arXiv:1608.03983, eq. 5, without restarts
            return (1 + math.cos(math.pi * step / steps)) / 2
        if self.kind == "one-cycle":  # L. N. Smith, N. Topin: Super-Convergence, arXiv:1708.07120; constants of PyTorch
            top, last = _RISE * steps - 1, steps - 1
            if step <= top:
                return _between(_START, 1.0, step / top)
            return _between(1.0, _END, (step - top) / (last - top)) if last > top else 1.0
        if self.kind == "step":
            done = step // (steps // epochs)
            return self.decay ** sum(done >= epoch for epoch in self.epochs)
        if self.kind == "linear-warmup":
            rise = self.warmup * steps
            return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)
        return 1.0


@dataclass(frozen=True)
class OptimizerRecipe:
    """An optimizer and how it is used.

    Attributes:
        name: one of ``OPTIMIZERS``.
        lr: the learning rate; where it changes, the greatest.
        weight_decay: of all parameters.
        more: further arguments of the optimizer: ``momentum``, ``nesterov``, ``betas``.
        clip_value: gradients are clipped to this magnitude, element by element; ``None``: they are not.
        clip_norm: gradients of a cell are scaled down to this norm; ``None``: they are not.
        schedule: of the learning rate.
        steps: of each cell in the whole run.
        epochs: likewise.
    """

    name: str
    lr: float
    weight_decay: float = 0.0
    more: tuple[tuple[str, Any], ...] = ()
    clip_value: float | None = None
    clip_norm: float | None = None
    schedule: LearningRate = field(default_factory=LearningRate)
    steps: int = 1
    epochs: int = 1

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, in the implementation that peaks lowest.

        Raises:
            InputError: unknown name.
        """
        if self.name not in _OPTIMIZERS:
            raise InputError(f"unknown optimizer {self.name!r}; expected one of {', '.join(OPTIMIZERS)}")
        kind, implementation = _OPTIMIZERS[self.name]
        arguments = {"lr": self.lr, "weight_decay": self.weight_decay, **dict(self.more), **implementation}
        return kind(parameters, **arguments)

    def prepare(self, learned: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
        """Clip gradients and set the learning rate, before step number ``step`` of a cell."""
        if self.clip_value is not None:
            for parameter in learned:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-self.clip_value, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(learned, self.clip_norm, foreach=False)
        if self.schedule.kind != "constant":
            for group in optimizer.param_groups:
                group["lr"] = self.lr * self.schedule.factor(step, self.steps, self.epochs)


def _between(first: float, last: float, share: float) -> float:
    """From ``first`` to ``last`` along half a cosine."""
    return last + (first - last) / 2 * (1 + math.cos(math.pi * share))


def _epochs(text: str) -> tuple[int, ...]:
    epochs = tuple(int(part) for part in text.split(","))
    if any(epoch < 1 for epoch in epochs) or sorted(set(epochs)) != list(epochs):
        raise ValueError
    return epochs


def _share(text: str, otherwise: float) -> float:
    found = float(text) if text else otherwise
    if not 0 < found < 1:
        raise ValueError
    return found
