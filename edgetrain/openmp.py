"""How PyTorch's threads wait for each other.

By default an OpenMP thread that has done its part of an operation spins until the others have done theirs. When
another program uses one of the cores, a thread that computes waits for a core on which another thread spins, and
training becomes tens of times slower. Threads that sleep instead give the core away. The policy is read when the
OpenMP library is loaded, so it must be set before torch is imported.
"""

from __future__ import annotations

import os
import sys
import warnings

from edgetrain.errors import EdgetrainWarning

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def yield_cores_while_waiting() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment states how they wait.

    Where torch is loaded already it is too late; a warning then says what to do.
    """
    if any(name in os.environ for name in _VARIABLES) or os.environ.get("OMP_NUM_THREADS") == "1":
        return
    if "torch" in sys.modules:
        warnings.warn(
            EdgetrainWarning(
                "torch was imported before edgetrain, so its threads spin while they wait, and training is many times"
                " slower when other programs use the cores: import edgetrain first, or set OMP_WAIT_POLICY=PASSIVE"
            ),
            stacklevel=3,
        )
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
