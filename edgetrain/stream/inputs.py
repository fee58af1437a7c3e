"""What the first cell reads of the prepared inputs: augmented and, by the rule, made into streams."""

from __future__ import annotations

from torch import Tensor

from edgetrain.data.augment import Augmentation
from edgetrain.objectives.base import Draws, Objective, Streams
from edgetrain.stream.reader import Prepare


def training_inputs(objective: Objective, augmentation: Augmentation | None = None) -> Prepare:
    """What the first cell learns from; ``augmentation`` changes the inputs before."""

    def prepare(streams: Streams, y: Tensor, draws: Draws) -> Streams:
        x = streams["x"]
        if augmentation is not None:
            x = augmentation(x, draws.uniform("augmentation", augmentation.columns, x))
        return objective.streams(x, y, draws)

    return prepare


def evaluation_inputs(objective: Objective) -> Prepare:
    """What the first cell reads where the classes are looked for."""

    def prepare(streams: Streams, y: Tensor, draws: Draws) -> Streams:
        return objective.unlabelled_streams(streams["x"])

    return prepare
