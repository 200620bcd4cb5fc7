"""Microscaling: floating-point elements that share a power of two, W^ = 2^(scale - 127) * element(code).

    code   a sign, an exponent and a mantissa, see numerics/minifloat.py
    scale  unsigned, 8 bits, one a group: the type E8M0 of the standard; 255, its NaN, is never stored

With e2m1 in groups of 32 this is MXFP4, with e3m2 or e2m3 MXFP6, with e4m3 or e5m2 MXFP8; other group sizes
are not the standard's. Bits a weight: bits + 8/group_size.

Source: OCP Microscaling Formats (MX) Specification 1.0, the element and scale types and the conversion rule
(the largest power of two in the group over the largest power of two among the elements); Rouhani et al. 2023
(arXiv 2310.10537), algorithm 1. The search over the two neighbouring exponents is bitmill's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params
from bitmill.formats.float import Elements
from bitmill.formats.part import Part
from bitmill.numerics.grouping import GroupSize
from bitmill.numerics.minifloat import ELEMENTS, ElementName
from bitmill.numerics.packing import unpack

_BIAS = 127
_LARGEST, _NAN = 254, 255


@FORMATS.register("microscaling")
@dataclass(frozen=True)
class Microscaling(Elements):
    """Elements with one power of two a group, as in the MX standard."""

    group_size: GroupSize = 32
    element: ElementName = "e2m1"

    shares: ClassVar[tuple[float, ...]] = (0.5, 2.0)
    standard_group: ClassVar[int | None] = 32

    def factor(self, params: Params) -> Tensor:
        """Return 2^(scale - 127)."""
        powers = [2.0 ** (code - _BIAS) for code in range(_LARGEST + 1)]
        return torch.tensor([*powers, torch.nan], device=params["scale"].device)[params["scale"].long()]

    def start(self, x: Tensor) -> Params:
        """Return floor(log2(largest magnitude)) less the element's own; magnitudes beyond its range saturate."""
        _, exponent = torch.frexp(x.abs().amax(-1))  # mantissas in [1/2, 1)
        return self._stored(exponent - 1 - ELEMENTS[self.element].largest_exponent)

    def with_factor(self, factor: Tensor, params: Params) -> Params:
        """Store the nearest power of two.

        Returns:
            "scale" (rows, groups), the exponent with bias 127.
        """
        mantissa, exponent = torch.frexp(factor)
        return self._stored(exponent - (mantissa < 0.75).to(exponent.dtype))

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the E8M0 scale."""
        return (Part("scale", self.grid(shape), 8),)

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return that a scale is the standard's NaN."""
        scale = unpack(tensors["scale"].movedim(0, -1), 8, self.grid(shape)[0])
        if bool((scale == _NAN).any()):
            return "its scale holds NaN"
        return super().damage_reason(tensors, shape)

    def _stored(self, exponent: Tensor) -> Params:
        return {"scale": (exponent + _BIAS).clamp(1, _LARGEST).to(torch.float32)}
