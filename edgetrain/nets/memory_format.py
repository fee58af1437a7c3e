"""The order of images in memory: contiguous [B, C, H, W], or channels-last, which many convolutions prefer.

On the CPU a training step of nets with overlapping or depthwise convolutions takes 0.77 to 1.07 of its time with images
in channels-last order (0.86 in the middle of nine nets), of one with a patch embedding, whose stride is as wide as its
kernel, 1.18 of it (``benchmarks/memory_format.py``). The rule is fixed, since the two orders differ in rounding: bits
must not depend on what a machine measured.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def prefers_channels_last(module: nn.Module) -> bool:
    """Whether a module has a 2-d convolution whose windows overlap."""
    return any(
        isinstance(part, nn.Conv2d)
        and any(kernel > stride for kernel, stride in zip(part.kernel_size, part.stride, strict=True))
        for part in module.modules()
    )


def convolution_weights(module: nn.Module) -> set[int]:
    """``id`` of the weights of its 2-d convolutions, which are kept in the order of the images."""
    return {id(part.weight) for part in module.modules() if isinstance(part, _CONVOLUTIONS)}


def to_channels_last(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in channels-last order; other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def dense_format(x: Tensor) -> torch.memory_format:
    """Channels-last if a tensor lies so in memory, else contiguous."""
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
