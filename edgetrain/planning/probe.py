"""A few steps on the device itself, to find memory that the dry run cannot see.

Kernels may take scratch memory from the allocator (cuDNN's workspaces, sort buffers, attention's fallbacks). Before a
plan is final, a cell of each kind takes some steps on zeros, under the budget's cap, and what the allocator reserved
is compared with the prediction. Not measured on a GPU yet.
"""

from __future__ import annotations

import torch

from edgetrain.memory import device as devices
from edgetrain.memory.meter import LiveBytes, LiveMeter
from edgetrain.memory.timeline import Timeline
from edgetrain.planning.dryrun import Bench, Peak, evaluate, visit
from edgetrain.planning.workload import Workload


class Probe:
    """Measures visits on a CUDA device.

    Args:
        budget: bytes that the allocator may reserve; ``None``: no limit.
    """

    def __init__(self, budget: int | None):
        self._budget = budget

    def scratch_bytes(self, work: Workload, index: int, micro_batch: int, tiles: int, predicted: Peak) -> int:
        """Bytes that a visit to cell ``index`` reserves beyond the predicted peak.

        If memory runs out, enough to exceed the budget.
        """
        try:
            with devices.running_on(work.device, self._budget):
                reserved = self._reserved(work, index, micro_batch, tiles, predicted)
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            reserved = 1 + (self._budget or devices.total_bytes(work.device) or 0)
        finally:
            devices.empty_cache(work.device)
        return max(0, reserved - predicted.bytes)

    def _reserved(self, work: Workload, index: int, micro_batch: int, tiles: int, predicted: Peak) -> int:
        device, table = work.device, _bench(work.device)
        devices.empty_cache(device)
        devices.seed_pool(device, predicted.seed)
        visit(work, index, micro_batch, table, tiles)
        devices.synchronize(device)
        in_training = devices.peak_reserved_bytes(device)
        devices.empty_cache(device)
        devices.seed_pool(device, predicted.evaluation_seed)
        evaluate(work, index, micro_batch, table, tiles)
        devices.synchronize(device)
        return max(in_training, devices.peak_reserved_bytes(device))


def _bench(device: torch.device) -> Bench:
    tracker = LiveBytes()
    return Bench(tracker, LiveMeter(full=True, tracker=tracker), Timeline(), None, None, device)
