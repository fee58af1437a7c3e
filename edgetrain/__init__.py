"""Train deep networks one cell at a time, under a memory budget that you state.

>>> import edgetrain
>>> run = edgetrain.fit("mlp:1000x2", "mnist", method="mf", max_gpu_mb=64)  # doctest: +SKIP
>>> run.predict(rows)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgetrain.openmp import yield_cores_while_waiting

if TYPE_CHECKING:
    from edgetrain.api import Run, append_cells, drop_cells, fit, open_run, report_runs, retrain_cells

__all__ = ["Run", "append_cells", "drop_cells", "fit", "open_run", "report_runs", "retrain_cells"]
__version__ = "0.2.0"

yield_cores_while_waiting()


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for."""
    if name in __all__:
        from edgetrain import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgetrain' has no attribute {name!r}")
