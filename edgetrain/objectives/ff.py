"""Forward-Forward: a cell tells inputs with the right label from inputs with a wrong one.

Geoffrey Hinton: The Forward-Forward Algorithm: Some Preliminary Investigations, 2022,
https://arxiv.org/abs/2212.13345
Heung-Chang Lee, Jeonggeun Song: SymBa: Symmetric Backpropagation-Free Contrastive Learning with
Forward-Forward Algorithm for Optimizing Convergence, 2023, https://arxiv.org/abs/2303.08418

The label, one-hot, is part of the input: the right one (positive), a random wrong one (negative), 1/C each
(neutral). In images it replaces the first C pixels; in tables, which have no pixels to spare, it stands beside
the columns. Each cell after the first divides its input by its root mean square
(the net's ``prenorm=rms``), so that only the direction of the activities is read. With the
goodness g = mean over the units of a^2:

    FF:     L = 1/2 [softplus(threshold - g+) + softplus(g- - threshold)]
    SymBa:  L = softplus(-alpha (g+ - g-))

A class is read off by writing each label in turn and summing the goodness over the cells. Hinton's
one-pass classifier reads all cells' normalised activities for the neutral label (trained if
``--classifier-epochs`` asks for it). Open: mean instead of sum of squares with threshold 2, alpha 4, and
that the sum includes the first cell, which Hinton leaves out. His peer normalisation is not built.
Wrong labels are drawn afresh in every epoch (``separate``: for the first cell; later cells read the
cached views).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, rms_norm, softplus

from edgetrain.errors import InputError
from edgetrain.objectives.base import Batch, Constants, Defaults, Draws, Node, Step, Streams
from edgetrain.objectives.statistic import StatisticObjective

_EPSILON = 1e-8  # under the root of a mean square, as in the nets' prenorm=rms


class ForwardForward(StatisticObjective):
    """Goodness of right labels above a threshold, of wrong ones below."""

    name = "ff"
    citation = "G. Hinton: The Forward-Forward Algorithm: Some Preliminary Investigations. arXiv:2212.13345, 2022."
    needs = "labels; images of at least twice as many pixels as classes, or tables"
    net_defaults: ClassVar[Mapping[str, str]] = {"bias": "1", "prenorm": "rms", "pool": "max"}
    constants: Constants = MappingProxyType({"threshold": 2.0})
    defaults = Defaults(schedule="separate", optimizer="adam", lr=3e-3)
    vote = "sum"
    classifier = "all"
    classifier_stream = "neutral"
    takes_tokens = False
    draws_streams = True

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.stream_names = ("pos", "neg", "neutral") if self.trains_classifier else ("pos", "neg")
        self._beside = self.options.get("label") == "beside"
        self.unlabelled_names = (*(f"label{label}" for label in range(self.classes)), "neutral")

    @classmethod
    def reads(cls, shape: tuple[int, ...], table: bool, classes: int) -> tuple[int, ...]:
        """See ``Objective.reads``: a table's columns and the label."""
        return (shape[0] + classes,) if table else shape

    def remarks(self, cells: Sequence[Node]) -> tuple[str, ...]:
        """See ``Objective.remarks``."""
        inputs = prod(cells[0].parent.shape)
        if self._beside:
            return (f"{self.name} reads the label beside the {inputs} inputs, in {self.classes} more.",)
        return (f"{self.name} writes the label over the first {self.classes} of {inputs} inputs.",)

    def check(self, cells: Sequence[Node]) -> None:
        """See ``Objective.check``: a label that replaces inputs must leave at least half of them."""
        inputs = prod(cells[0].parent.shape)
        if not self._beside and inputs < 2 * self.classes:
            raise InputError(
                f"{self.name} writes the label over the first inputs, one for each class; the data have"
                f" {self.classes} classes and only {inputs} inputs, so that too little of a sample is left: give the"
                f" net {inputs + self.classes} inputs and the data as a table, or use another method"
            )

    def streams(self, x: Tensor, y: Tensor, draws: Draws) -> Streams:
        """``pos``, ``neg`` and, if a classifier is trained, ``neutral``."""
        chance = draws.uniform("wrong label", 1, x)[:, 0]  # [B]
        steps = (chance * (self.classes - 1)).long().clamp_(max=self.classes - 2) + 1
        made = {"pos": self._stamped(x, y), "neg": self._stamped(x, (y + steps) % self.classes)}
        return made | self._neutral(x) if self.trains_classifier else made

    def unlabelled_streams(self, x: Tensor) -> Streams:
        """One stream for each label, and ``neutral``."""
        tried = range(self.classes)
        labelled = {f"label{label}": self._stamped(x, x.new_full((len(x),), label).long()) for label in tried}
        return labelled | self._neutral(x)

    def statistic(
        self, cell: nn.Module, head: Any, streams: Streams, units: int | None = None
    ) -> tuple[Tensor, Streams]:
        """The goodness for the right and a wrong label, [B, 2], or for each label in turn, [B, C]."""
        names = self.learned_streams if "pos" in streams else self.unlabelled_names[:-1]
        latents = {name: cell(streams[name]) for name in names}
        goodness = [a.flatten(1).square().sum(1) / (units or a[0].numel()) for a in latents.values()]
        if "neutral" in streams:  # only the classifier reads it
            with torch.no_grad():
                latents["neutral"] = cell(streams["neutral"])
        return torch.stack(goodness, 1), latents

    def loss_from(self, statistic: Tensor, head: Any, batch: Batch) -> Step:
        """Summed losses from the goodness with the right and with a wrong label, [B, 2]."""
        return Step(self.separation(statistic[:, 0], statistic[:, 1]).sum())

    def scores_from(self, statistic: Tensor) -> Tensor:
        """Goodness of each label, [B, C]."""
        return statistic

    def separation(self, good: Tensor, bad: Tensor) -> Tensor:
        """Loss of each sample [B] from its goodness with the right and with a wrong label."""
        threshold = self.constants["threshold"]
        return (softplus(threshold - good) + softplus(bad - threshold)) / 2

    @property
    def learned_streams(self) -> tuple[str, ...]:
        """See ``StatisticObjective.learned_streams``."""
        return ("pos", "neg")

    def features(self, latents: Tensor) -> Tensor:
        """Normalised activities, [B, n]."""
        flat = latents.flatten(1)
        return rms_norm(flat, flat.shape[1:], eps=_EPSILON)

    def _neutral(self, x: Tensor) -> dict[str, Tensor]:
        return {"neutral": self._written(x, 1 / self.classes)}

    def _stamped(self, x: Tensor, labels: Tensor) -> Tensor:
        """Inputs [B, ...] with one-hot labels in their first places, or beside them."""
        return self._written(x, one_hot(labels, self.classes).to(x.dtype))

    def _written(self, x: Tensor, values: Tensor | float) -> Tensor:
        if self._beside:
            label = x.new_empty(len(x), self.classes)
            label[:] = values
            return torch.cat([x, label], 1)  # [B, F + C]
        written = x.flatten(1).clone()
        written[:, : self.classes] = values
        return written.view_as(x)


class SymBa(ForwardForward):
    """The goodness of a right label above that of a wrong one."""

    name = "symba"
    citation = (
        "H.-C. Lee, J. Song: SymBa: Symmetric Backpropagation-Free Contrastive Learning with Forward-Forward"
        " Algorithm for Optimizing Convergence. arXiv:2303.08418, 2023."
    )
    constants: Constants = MappingProxyType({"alpha": 4.0})

    def separation(self, good: Tensor, bad: Tensor) -> Tensor:
        """See ``ForwardForward.separation``."""
        return softplus(-self.constants["alpha"] * (good - bad))
