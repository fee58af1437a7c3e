"""Whether a net is the one that a run was trained with.

Names and shapes of weights are compared when they are loaded; here the journal's fingerprints of the cells are,
so that another activation, another order or a missing cell is found before any weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetrain.errors import CorruptError, InputError
from edgetrain.nets.trial import same_behaviour
from edgetrain.objectives.base import Node
from edgetrain.store.run import RunFolder

Fingerprint = list[Any]  # name, digest of the signature, numbers of its behaviour


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
        CorruptError: the journal holds no fingerprints.
    """
    known, found = folder.journal.net(), fingerprints(nodes)
    if known is None:
        return
    if kept is None and len(known) != len(found):
        raise InputError(f"{folder.path}: was trained with a net of {len(known)} cells; this one has {len(found)}")
    for number, (old, new) in enumerate(zip(known[:kept], found[:kept], strict=kept is None), 1):
        try:
            same = same_behaviour(old[2:], new[2:]) and (not training or old[1] == new[1])
        except (TypeError, IndexError) as error:
            raise CorruptError(f"{folder.path}: its journal does not describe cell {number} ({error})") from error
        if not same:
            raise InputError(
                f"{folder.path}: cell {number} of this net ({new[0]}) is not the one that the run was trained with"
                f" ({old[0]}): its layers or what they compute differ; use the same net"
            )
