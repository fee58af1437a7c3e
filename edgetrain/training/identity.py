"""Whether a net is the one that a run was trained with.

Names and shapes of weights are compared when they are loaded; here the journal's fingerprints of the cells are,
so that another activation, another order or a missing cell is found before any weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgetrain.errors import InputError
from edgetrain.nets.trial import same_behaviour
from edgetrain.objectives.base import Node
from edgetrain.store.entries import Fingerprint
from edgetrain.store.run import RunFolder


def fingerprints(nodes: Sequence[Node]) -> list[Fingerprint]:
    """Of the layers of all cells, in order."""
    return [each for node in nodes for each in node.recipe.fingerprints()]


def check_net(folder: RunFolder, nodes: Sequence[Node], training: bool, kept: int | None = None) -> None:
    """Compare a net's cells with those that the run in a folder was trained with.

    Args:
        folder: of the run.
        nodes: of the net.
        training: whether the cells are to be trained on, so that what matters in training alone (dropout, frozen
            weights) must be the same too.
        kept: how many of the first cells to compare; ``None``: all, and their number.

    Raises:
        InputError: they differ.
    """
    begin, found = folder.begin(), fingerprints(nodes)
    if begin is None:
        return
    known = begin.net
    if kept is None and len(known) != len(found):
        raise InputError(f"{folder.path}: was trained with a net of {len(known)} cells; this one has {len(found)}")
    for number, (old, new) in enumerate(zip(known[:kept], found[:kept], strict=kept is None), 1):
        if not same_behaviour(old.behaviour, new.behaviour) or (training and old.signature != new.signature):
            raise InputError(
                f"{folder.path}: cell {number} of this net ({new.name}) is not the one that the run was trained with"
                f" ({old.name}): its layers or what they compute differ; use the same net"
            )
