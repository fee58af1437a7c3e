"""How one sample of a stream lies on disk: a fixed number of bytes, decoded on the device.

Latents travel as bytes from disk to device, so a narrow format also saves bus; only there do they
become float32 again.

=========  ==========================================  =============================
dtype      bytes of a row of n elements                lossless for
=========  ==========================================  =============================
float32    4 n                                         everything (the exact reference)
float16    2 n                                         -
bfloat16   2 n                                         -
uint8      8 + n, padded to 4: low and step of the     -
           row as float32, then q = (v - low) / step
pixels     n, value = byte / pixel_max                 8-bit images
int64      8 n                                         labels
tokens     4 n, as int32; int64 once decoded           ids of words below 2^31
=========  ==========================================  =============================

Legend: B rows of a batch, n elements of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LATENT_DTYPES = ("float32", "float16", "bfloat16", "uint8")
_PLAIN = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "tokens": torch.int32,
}
_HEADER = 8  # bytes: low and step of a uint8 row


@dataclass(frozen=True)
class Normalization:
    """Normalises images channel by channel: (value - mean) / deviation, in float32.

    Attributes:
        mean: of each channel; one for all values of grey images and of flattened ones.
        std: standard deviation, likewise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply_(self, values: torch.Tensor) -> torch.Tensor:
        """Normalise images [B, C, ...], float32, in place."""
        if len(self.mean) == 1:
            return values.sub_(self.mean[0]).div_(self.std[0])
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            values[:, channel].sub_(mean).div_(std)
        return values


@dataclass(frozen=True)
class RowFormat:
    """Shape and byte layout of the rows of one stream.

    Attributes:
        shape: of a decoded row.
        dtype: how the row is stored; see the table above.
        pixel_max: of ``pixels``.
        normalization: of decoded images, ``pixels`` or float32.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    pixel_max: float = 255.0
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (*_PLAIN, "uint8", "pixels"):
            raise ValueError(f"unknown row dtype {self.dtype!r}")

    @property
    def elements(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, padding included."""
        if self.dtype == "uint8":
            return -(-(_HEADER + self.elements) // 4) * 4
        if self.dtype == "pixels":
            return self.elements
        return self.elements * _PLAIN[self.dtype].itemsize

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype that ``decode`` gives: int64 for labels and tokens, float32 otherwise."""
        return torch.int64 if self.dtype in ("int64", "tokens") else torch.float32

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Values [B, *shape] as bytes [B, row_bytes], uint8.

        ``pixels`` takes uint8 values as they are; the others take float32 (labels: int64,
        tokens: int64 or int32).
        """
        flat = values.reshape(values.shape[0], self.elements)
        if self.dtype == "pixels":
            return flat.contiguous()
        if self.dtype == "uint8":
            return self._quantise(flat)
        return flat.to(_PLAIN[self.dtype]).contiguous().view(torch.uint8)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Bytes [B, row_bytes] on any device as values [B, *shape]; plain float32 is a view, not a copy."""
        if self.normalization is None:
            return self._decoded(rows)
        values = self._decoded(rows)
        return self.normalization.apply_(values if self.dtype == "pixels" else values.clone())

    def _decoded(self, rows: torch.Tensor) -> torch.Tensor:
        shape = (rows.shape[0], *self.shape)
        if self.dtype == "pixels":
            return rows.to(torch.float32).div_(self.pixel_max).view(shape)
        if self.dtype == "uint8":
            header = rows[:, :_HEADER].view(torch.float32)
            codes = rows[:, _HEADER : _HEADER + self.elements].to(torch.float32)
            return codes.mul_(header[:, 1:]).add_(header[:, :1]).view(shape)
        return rows.view(_PLAIN[self.dtype]).to(self.value_dtype).view(shape)

    def _quantise(self, flat: torch.Tensor) -> torch.Tensor:
        """Per row, 256 levels between min(0, least) and the greatest value."""
        low = flat.amin(dim=1, keepdim=True).clamp_(max=0.0)
        step = (flat.amax(dim=1, keepdim=True) - low).div_(255.0)
        codes = (flat - low).div_(step.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        rows = flat.new_zeros(flat.shape[0], self.row_bytes, dtype=torch.uint8)
        rows[:, :_HEADER] = torch.cat([low, step], dim=1).view(torch.uint8)
        rows[:, _HEADER : _HEADER + self.elements] = codes.clamp_(max=255.0).to(torch.uint8)
        return rows
