"""What runs that are compared with plain PyTorch have in common; tests ask for it by name."""

from __future__ import annotations

import pytest
import torch

from edgetrain.planning import planner, timelines
from edgetrain.planning.dryrun import Peak


@pytest.fixture
def one_thread():
    """The references compute with as many threads as the runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def peaks_unknown(request, monkeypatch):
    """Without a budget no bit depends on predicted peaks, and to predict them takes half of the time."""
    if "budget" not in request.node.name:
        monkeypatch.setattr(planner, "cell_peak", lambda work, *how: Peak(0))
        monkeypatch.setattr(planner, "resident_peak", lambda work, sizes: (0, [0] * len(sizes)))
        monkeypatch.setattr(timelines, "of_run", lambda work, plan: [])
        monkeypatch.setattr(timelines, "of_backpropagation", lambda *net: None)
