"""Local learning rules, one file each."""

from __future__ import annotations

from edgetrain.objectives.base import Objective
from edgetrain.objectives.ff import ForwardForward, SymBa
from edgetrain.objectives.lbp import (
    AutoencoderCells,
    ConvolutionalAutoencoderCells,
    DenoisingAutoencoderCells,
    GenerativeAdversarialCells,
)
from edgetrain.objectives.mf import MonoForward
from edgetrain.objectives.predsim import PredictionAndSimilarity
from edgetrain.objectives.sll import StochasticLayerwise, StochasticLayerwiseBlocks

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        MonoForward,
        AutoencoderCells,
        DenoisingAutoencoderCells,
        ConvolutionalAutoencoderCells,
        GenerativeAdversarialCells,
        ForwardForward,
        SymBa,
        StochasticLayerwise,
        StochasticLayerwiseBlocks,
        PredictionAndSimilarity,
    )
}
