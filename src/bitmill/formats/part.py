"""The parameter arrays of a format as stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitmill.numerics.packing import pack, unpack, unpack_at, words_for

ScaleType = Literal["float16", "float32"]  # of stored scales; codes of other programs may need the latter
SCALE_TYPES: dict[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Part:
    """A parameter array in its stored form: numbers of `dtype`, or unsigned integers of `bits` bits.

    With `span`, so many neighbouring groups have one number, which is stored once: `shape` is that of the working
    values (rows, groups).
    """

    name: str
    shape: tuple[int, ...]
    bits: int | None = None
    stored_as: torch.dtype = torch.float16  # without `bits`
    span: int = 1  # without `bits`

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape on disk. Integers are packed along the rows, which leaves no holes in short group axes."""
        if self.bits is None:
            return self.shape if self.span == 1 else (self.shape[0], -(-self.shape[1] // self.span))
        return (words_for(self.shape[0], self.bits), *self.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Type on disk."""
        return self.stored_as if self.bits is None else torch.int32

    def pack(self, values: Tensor) -> Tensor:
        """Return working values in their stored form."""
        if self.bits is None:
            return self._shared(values).to(self.stored_as).contiguous()
        return pack(values.movedim(0, -1), self.bits).movedim(-1, 0).contiguous()

    def unpack(self, stored: Tensor) -> Tensor:
        """Invert `pack`: fp32 values; arrays of integers without `bits` keep their type."""
        if self.bits is not None:
            stored = unpack(stored.movedim(0, -1), self.bits, self.shape[0]).movedim(-1, 0)
            return stored.to(torch.float32)
        return self._repeated(stored.to(torch.float32) if stored.is_floating_point() else stored)

    def unpack_rows(self, stored: Tensor, rows: Tensor) -> Tensor:
        """Unpack some rows at the cost of those rows alone; a part that all rows share is unpacked whole.

        Args:
            stored: as returned by `pack`.
            rows: int64 (n,).
        """
        if self.shape[0] == 1:
            return self.unpack(stored)
        if self.bits is not None:
            return unpack_at(stored.movedim(0, -1), self.bits, rows).movedim(-1, 0).to(torch.float32)
        return self._repeated(stored[rows].to(torch.float32) if stored.is_floating_point() else stored[rows])

    def _shared(self, values: Tensor) -> Tensor:
        """Return the mean of every `span` groups, which is their number where they have one."""
        return (
            values
            if self.span == 1
            else span_sums(values, self.span) / span_sums(torch.ones_like(values), self.span)
        )

    def _repeated(self, stored: Tensor) -> Tensor:
        """Return the number of every group."""
        return stored if self.span == 1 else repeated(stored, self.span, self.shape[1])


def span_sums(values: Tensor, span: int) -> Tensor:
    """Return the sums over every `span` neighbouring groups, of which the last may have fewer.

    Args:
        values: (rows, groups).
        span: groups.

    Returns:
        (rows, spans).
    """
    return torch.nn.functional.pad(values, (0, -values.shape[1] % span)).unflatten(1, (-1, span)).sum(-1)


def repeated(values: Tensor, span: int, groups: int) -> Tensor:
    """Return for each of `groups` groups the value of its span, (rows, groups).

    Args:
        values: (rows, spans).
        span: groups.
        groups: of a row.
    """
    return values[:, torch.arange(groups, device=values.device) // span]


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return which of some packed tensors holds NaN or Inf, as part of a sentence; None if all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(torch.aminmax(tensor))  # NaN if there is one; much faster than isfinite
            if not bool(torch.isfinite(ends).all()):
                return f"its {name} holds NaN or Inf"
    return None
