"""Whole-net rules, for comparison: the machine trains them as a net of one large cell."""

from __future__ import annotations

from edgetrain.baselines.alignment import DirectFeedbackAlignment, FeedbackAlignment
from edgetrain.baselines.backprop import (
    Backpropagation,
    CheckpointedBackpropagation,
    OffloadedBackpropagation,
    SingleLayer,
    StreamedBackpropagation,
)
from edgetrain.objectives.base import Objective

BASELINES: dict[str, type[Objective]] = {
    baseline.name: baseline
    for baseline in (
        SingleLayer,
        Backpropagation,
        CheckpointedBackpropagation,
        OffloadedBackpropagation,
        StreamedBackpropagation,
        FeedbackAlignment,
        DirectFeedbackAlignment,
    )
}
