"""Host memory and disk of a run, by arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from msgspec import json

from edgetrain.memory.queues import copies_async
from edgetrain.objectives.base import Node
from edgetrain.planning.cut import choose_cut, latents_held, latents_written, least_room
from edgetrain.planning.schedule import WHOLE, Cut
from edgetrain.planning.workload import Workload
from edgetrain.store.journal import SLACK
from edgetrain.store.latents import BLOCK_BYTES, DEFAULT_WINDOW
from edgetrain.stream.cell import shapes_of

STATE_BYTES_PER_PARAMETER = 12  # a float32 weight and Adam's two moments
_LABEL_BYTES = 8
_HEADER_BYTES = 512  # of a safetensors file without tensors
_TENSOR_BYTES = 256  # of a tensor's place in the header, and of a single number


def latent_bytes(work: Workload, index: int) -> int:
    """Bytes on disk of the training latents that node ``index`` emits; 0 if they are not read."""
    return work.views * work.rows * work.row_bytes_into(index + 1) if work.emits(index) else 0


def host_bytes(work: Workload, params: list[int]) -> int:
    """Host memory for batches on their way, for mapped pages, for two cells in transit, and for a user's modules."""
    order = work.rows * _LABEL_BYTES
    transit = 2 * STATE_BYTES_PER_PARAMETER * max(params)
    kept = sum(node.recipe.kept_bytes for node in work.nodes)
    return staging_bytes(work) + order + transit + kept + DEFAULT_WINDOW


@dataclass(frozen=True)
class HostNeed:
    """What a run needs of the host's memory besides cells that wait there, and what goes to disk instead.

    Attributes:
        bytes: of host memory.
        on_disk: bytes of what waits between the layers of a step that goes through all of them (``bp-stream``).
        written: bytes of that, and of layers that find no room in memory, in all steps.
    """

    bytes: int
    on_disk: int = 0
    written: int = 0


def host_need(work: Workload, params: list[int], leanest: bool, budget: int | None) -> HostNeed:
    """The need of a run.

    Args:
        work: the run.
        params: of the cells.
        leanest: whether cells wait on disk in any case.
        budget: bytes of host memory; ``None``: no limit.
    """
    need = host_bytes(work, params)
    if not work.streams_layers:
        return HostNeed(need)
    between = 4 * min(work.batch_size, work.rows) * sum(prod(node.shape) for node in work.nodes[:-1])
    on_disk = between if budget is not None and need + between > budget else 0
    need += between - on_disk
    states = [STATE_BYTES_PER_PARAMETER * each for each in params]
    tier = max(0, budget - need) if budget is not None else 0 if leanest else sum(states)
    away = 2 * on_disk
    for size in reversed(states):  # the last layer is the first to leave the device with a state
        fits = size <= tier
        tier, away = (tier - size, away) if fits else (tier, away + size)
    return HostNeed(need, on_disk, work.epochs * work.steps * away)


def staging_bytes(work: Workload) -> int:
    """Host memory for batches on their way to the device and back."""
    size, nodes = min(work.batch_size, work.rows), range(work.depth)
    read = [0] if work.streams_layers else nodes
    buffer = _page_locked_bytes if copies_async(work.device) else int

    def batch(row_bytes: Iterable[int]) -> int:
        return sum(buffer(size * each) for each in row_bytes)

    reads = max(batch(layout.row_bytes for layout in work.formats_into(index).values()) for index in read)
    writes = max(batch(4 * layout.elements for layout in work.formats_into(index + 1).values()) for index in nodes)
    return (work.prefetch + 2) * (reads + batch([_LABEL_BYTES])) + 3 * writes


def _page_locked_bytes(size: int) -> int:
    """What a page-locked buffer takes: PyTorch rounds it up to a power of two."""
    return 1 << max(0, size - 1).bit_length()


def input_bytes(work: Workload) -> int:
    """Disk of the prepared inputs and labels, training and test."""
    return (work.rows + work.test_rows) * (work.inputs.row_bytes + _LABEL_BYTES)


def evaluation_bytes(work: Workload) -> int:
    """Disk of the test rows' latents, of two cells at once, in float32 and every stream."""
    widths = [0, *(prod(node.shape) for node in work.nodes[:-1]), 0]
    return 4 * work.test_rows * len(work.objective.unlabelled_names) * max(map(sum, pairwise(widths)))


def fixed_disk_bytes(work: Workload, params: int) -> int:
    """Disk that a run needs beside its training latents: inputs, cells, and the model."""
    # While a checkpoint replaces cells, both generations exist; then the model joins the last one.
    return input_bytes(work) + 2 * STATE_BYTES_PER_PARAMETER * params + bookkeeping_bytes(work)


def bookkeeping_bytes(work: Workload) -> int:
    """Disk of all that is neither rows nor parameters, at most: buffers, headers, checksums, journal, record, settings.

    Rounded up to 64 KiB.
    """
    known: dict[Hashable, tuple[int, int, int]] = {}
    cells = model = names = prints = 0
    for node in work.nodes:
        kind = node.recipe.signature, node.parent.shape
        if kind not in known:
            known[kind] = (*_beside_parameters(work, node), len(json.encode(node.recipe.fingerprints())) + 8)
        state, optimizer, fingerprint = known[kind]
        prints += fingerprint
        cells, model = cells + state + optimizer, model + state
        names += len(node.recipe.name) + 8
    visits = work.depth + 1
    cells += 2 * _HEADER_BYTES * visits + 4 * _TENSOR_BYTES * (visits + 3) + 8 * prod(work.inputs.shape)
    epochs = max(work.epochs, work.classifier_epochs)
    evaluations = 0 if work.evaluate_every is None else 120 * (epochs // work.evaluate_every)
    settings = 8192 + 48 * visits + 2 * names
    streams = visits * len(work.objective.stream_names)
    needed = settings + names + prints + visits * (1200 + 40 * epochs + evaluations) + 400 * streams
    series = 200 * (900 + 8 * visits)
    record = 8192 + 2 * names + visits * (1500 + 80 * epochs + evaluations) + series
    sums = 2 * 8 * sum(2 * work.views * work.rows * work.row_bytes_into(index) // BLOCK_BYTES + 1
                       for index in range(1, visits))  # fmt: skip
    total = 2 * cells + model + 2 * _HEADER_BYTES + settings + 3 * needed + SLACK + record + sums
    return -(-total // SLACK) * SLACK


def _beside_parameters(work: Workload, node: Node) -> tuple[int, int]:
    """Bytes of a cell's files that are not parameters or their moments: of weights and head, and of the optimizer."""
    modules = [module for module in shapes_of(node, work.objective) if module is not None]
    state = [named for module in modules for named in module.state_dict().items()]
    learned = [named for module in modules for named in module.named_parameters()]
    buffers = sum(value.nbytes for _, value in state) - sum(value.nbytes for _, value in learned)
    named = sum(_TENSOR_BYTES + len(name) for name, _ in state)
    return max(buffers, 0) + named, 3 * sum(_TENSOR_BYTES + len(name) for name, _ in learned)


def disk_bytes(work: Workload, params: int, placement: str, cut: Cut = WHOLE, budget: int | None = None) -> int:
    """The most that the run folder holds: inputs, the latents needed at once, cells, the model, and the rest.

    Latents on the device are written by checkpoints within an epoch; if ``budget`` is too small for that, the run
    skips such checkpoints.
    """
    on_device = placement == "resident" and (budget is not None or not work.emits_in_training)
    latents = 0 if on_device else latents_held(work, cut)
    return fixed_disk_bytes(work, params) + _with_evaluation(work, latents)


def _with_evaluation(work: Workload, latents: int) -> int:
    """Disk of training latents and of those of evaluated rows, which exist at once only if training is evaluated."""
    evaluated = evaluation_bytes(work)
    return max(latents, evaluated) if work.evaluate_every is None else latents + evaluated


def written_bytes(work: Workload, params: int, placement: str, cut: Cut = WHOLE) -> int:
    """What the run writes in all when the host tier has room for its cells and it saves two checkpoints."""
    latents = 0 if placement == "resident" else latents_written(work, cut)
    return input_bytes(work) + latents + 2 * STATE_BYTES_PER_PARAMETER * params + 4 * params


def cut_for(work: Workload, params: int, placement: str, budget: int | None) -> Cut:
    """The cut of the latents with which the run folder stays within ``budget``, if there is one."""
    if budget is None or placement == "resident":
        return WHOLE
    evaluated = 0 if work.evaluate_every is None else evaluation_bytes(work)
    return choose_cut(work, budget - fixed_disk_bytes(work, params) - evaluated) or WHOLE


def least_disk_bytes(work: Workload, params: int, placement: str) -> int:
    """The smallest run folder that would do."""
    latents = 0 if placement == "resident" else least_room(work)
    return fixed_disk_bytes(work, params) + _with_evaluation(work, latents)
