"""Saved tensors of a backward pass wait on the host until the pass needs them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from edgetrain.memory import queues
from edgetrain.stream.state import Host

_Packed = tuple[bool, Tensor]


def saved_on_host(device: torch.device, host: Host, weights: Iterable[Tensor]) -> AbstractContextManager[object]:
    """A scope in which tensors saved for the backward pass go to the host; weights stay where they are.

    Args:
        device: where the computation runs, and where tensors come back to.
        host: the meter's scope for host tensors.
        weights: tensors of the cell, on the device anyway.
    """
    staying = {weight.untyped_storage()._cdata for weight in weights}

    def pack(saved: Tensor) -> _Packed:
        if saved.untyped_storage()._cdata in staying:
            return True, saved
        with host():
            away = queues.staging(tuple(saved.shape), saved.dtype, device)
            return False, away.copy_(saved.detach(), non_blocking=False)

    def unpack(packed: _Packed) -> Tensor:
        stayed, saved = packed
        return saved if stayed else torch.empty_like(saved, device=device).copy_(saved)

    return saved_tensors_hooks(pack, unpack)
