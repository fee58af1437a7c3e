"""Whole-net rules, for comparison: the machine trains them as a net of one large cell."""

from __future__ import annotations

from edgetrain.baselines.backprop import Backpropagation
from edgetrain.objectives.base import Objective

BASELINES: dict[str, type[Objective]] = {Backpropagation.name: Backpropagation}
