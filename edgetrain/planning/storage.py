"""Host memory and disk of a run, by arithmetic."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from edgetrain.planning.cut import choose_cut, latents_held, latents_written, least_room
from edgetrain.planning.schedule import WHOLE, Cut
from edgetrain.planning.workload import Workload
from edgetrain.store.latents import DEFAULT_WINDOW

STATE_BYTES_PER_PARAMETER = 12  # a float32 weight and Adam's two moments
_LABEL_BYTES = 8


def latent_bytes(work: Workload, index: int) -> int:
    """Bytes on disk of the training latents that node ``index`` emits; 0 if nobody reads them."""
    return work.views * work.rows * work.row_bytes_into(index + 1) if work.hands_on(index) else 0


def host_bytes(work: Workload, params: list[int]) -> int:
    """Host memory for batches on their way, for mapped pages, for two cells in transit, and for a user's modules."""
    order = work.rows * _LABEL_BYTES
    transit = 2 * STATE_BYTES_PER_PARAMETER * max(params)
    kept = sum(node.recipe.kept_bytes for node in work.nodes if node.recipe is not None)
    return staging_bytes(work) + order + transit + kept + DEFAULT_WINDOW


def staging_bytes(work: Workload) -> int:
    """Host memory for batches on their way to the device and back."""
    size = min(work.batch_size, work.rows)
    nodes = range(work.depth)
    readers = (work.prefetch + 2) * size * (_LABEL_BYTES + max(work.row_bytes_into(index) for index in nodes))
    return readers + 3 * size * max(_float_bytes(work, index + 1) for index in nodes)


def _float_bytes(work: Workload, index: int) -> int:
    """Bytes of one sample that node ``index`` reads, all streams together, as float32."""
    return 4 * sum(layout.elements for layout in work.formats_into(index).values())


def input_bytes(work: Workload) -> int:
    """Disk of the prepared inputs and labels, training and test."""
    return (work.rows + work.test_rows) * (work.inputs.row_bytes + _LABEL_BYTES)


def evaluation_bytes(work: Workload) -> int:
    """Disk of the test rows' latents, of two cells at once, in float32 and every stream."""
    widths = [0, *(prod(node.shape) for node in work.nodes[:-1]), 0]
    return 4 * work.test_rows * len(work.objective.unlabelled_names) * max(map(sum, pairwise(widths)))


def fixed_disk_bytes(work: Workload, params: int) -> int:
    """Disk that a run needs beside its training latents: inputs, cells, and the model."""
    # While a commit replaces cells, both generations exist; then the model joins the last one.
    return input_bytes(work) + 2 * STATE_BYTES_PER_PARAMETER * params


def disk_bytes(work: Workload, params: int, placement: str, cut: Cut = WHOLE) -> int:
    """The most that the run folder holds: inputs, the latents needed at once, cells, and the model."""
    latents = 0 if placement == "resident" else latents_held(work, cut)
    return fixed_disk_bytes(work, params) + max(latents, evaluation_bytes(work))


def written_bytes(work: Workload, params: int, placement: str, cut: Cut = WHOLE) -> int:
    """What the run writes in all when the host tier has room for its cells and it commits twice."""
    latents = 0 if placement == "resident" else latents_written(work, cut)
    return input_bytes(work) + latents + 2 * STATE_BYTES_PER_PARAMETER * params + 4 * params


def cut_for(work: Workload, params: int, placement: str, budget: int | None) -> Cut:
    """The cut of the latents with which the run folder stays within ``budget``, if there is one."""
    if budget is None or placement == "resident":
        return WHOLE
    return choose_cut(work, budget - fixed_disk_bytes(work, params)) or WHOLE


def least_disk_bytes(work: Workload, params: int, placement: str) -> int:
    """The smallest run folder that would do."""
    latents = 0 if placement == "resident" else least_room(work)
    return fixed_disk_bytes(work, params) + max(latents, evaluation_bytes(work))
