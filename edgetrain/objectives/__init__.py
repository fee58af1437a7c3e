"""Local learning rules, one file each."""

from __future__ import annotations

from edgetrain.objectives.base import Objective
from edgetrain.objectives.lbp import AutoencoderCells, DenoisingAutoencoderCells
from edgetrain.objectives.mf import MonoForward

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (MonoForward, AutoencoderCells, DenoisingAutoencoderCells)
}
