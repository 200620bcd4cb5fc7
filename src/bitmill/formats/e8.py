"""E8: eight weights in sixteen bits, the points of a shifted E8 lattice near 0.

    code   16 bits a block of 8 columns: a pattern of absolute values, signs, and a shift of 1/4, see
           `numerics.e8`
    scale  fp16, one a tensor by default

Of all lattices in eight dimensions E8 rounds best, and 2**16 of its points around 0 follow the density of
Gaussian numbers: squared error 0.091 of the variance, where the best four levels have 0.1175. Made for
weights in a rotated basis, which are Gaussian and alike; outliers have no code. Bits a weight: 2.

Source: QuIP# (Tseng et al. 2024, arXiv 2402.04396), section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS
from bitmill.formats.vector import VectorFormat
from bitmill.numerics import e8
from bitmill.numerics.grouping import GroupSize


@FORMATS.register("e8")
@dataclass(frozen=True)
class E8(VectorFormat):
    """Scaled points of a shifted E8 lattice; `bits` is 2."""

    group_size: GroupSize = "tensor"

    block: ClassVar[int] = e8.BLOCK
    max_bits: ClassVar[int] = 2
    rms: ClassVar[float] = 1.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 2:
            raise RecipeError(f"e8 stores 2 bits, not {self.bits!r}; set bits=2.")

    @property
    def code_bits(self) -> int:
        """Bits of the one code of a block."""
        return 16

    def encode(self, x: Tensor) -> Tensor:
        """Return the nearest of 65536 points."""
        return e8.nearest(x)[:, None].to(torch.int32)

    def points(self, codes: Tensor) -> Tensor:
        """Look the points up."""
        return e8.points(codes.device)[codes[:, 0].long()]
