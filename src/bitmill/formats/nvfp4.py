"""NVFP4: E2M1 elements, an E4M3 scale a group, an fp32 scale a tensor.

    W^            tensor_scale * e4m3(scale) * e2m1(code), each product rounded to fp32
    code          4 bits: a sign, two bits of exponent, one of mantissa
    scale         unsigned, 8 bits, one a group: the code of a positive E4M3 number
    tensor_scale  fp32, one

A group's scale follows its largest magnitude in steps of 1/16 to 1/8, where MXFP4's powers of two are off by
up to a factor of two; the tensor's scale brings these scales into E4M3's range. NVIDIA's hardware has groups
of 16. Bits a weight: 4 + 8/group_size, and 32 for the tensor.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149): the tensor's largest
magnitude becomes 6 * 448, a group's becomes 6. The search over neighbouring scales is bitmill's; that a
group's largest magnitude may better become 4 is "Four Over Six" (arXiv 2512.02010).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params
from bitmill.formats.part import Part
from bitmill.formats.scaled import Scaled
from bitmill.numerics.grouping import GroupSize
from bitmill.numerics.minifloat import ELEMENTS, ElementTable
from bitmill.numerics.table import Table

_ELEMENT, _SCALE = ELEMENTS["e2m1"], ELEMENTS["e4m3"]


@FORMATS.register("nvfp4")
@dataclass(frozen=True)
class NVFP4(Scaled):
    """E2M1 elements with two levels of scales; `bits` is 4."""

    group_size: GroupSize = 16

    groups_independent: ClassVar[bool] = False  # the tensor's scale is shared
    shares: ClassVar[tuple[float, ...]] = (0.7, 0.76, 0.82, 0.88, 0.94, 1.06, 1.12, 1.2, 1.28, 1.36, 1.43, 1.5)
    standard_group: ClassVar[int | None] = 16

    @classmethod
    def default_bits(cls, given: Mapping[str, Any]) -> int:
        """Return the bits of E2M1."""
        return _ELEMENT.bits

    @property
    def stackable(self) -> bool:
        """False: each tensor has a scale of its own."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != _ELEMENT.bits:
            raise RecipeError(f"bits is {self.bits!r}, but nvfp4 has {_ELEMENT.bits}; set bits=4.")

    def table(self, device: torch.device) -> Table:
        """Return the E2M1 table."""
        return ElementTable("e2m1", device)

    def factor(self, params: Params) -> Tensor:
        """Return tensor_scale * e4m3(scale)."""
        scale = params["scale"]
        return _scales(scale.device).lookup(scale) * params["tensor_scale"]

    def start(self, x: Tensor) -> Params:
        """Map the tensor's largest magnitude to 6 * 448, and a group's to 6."""
        largest = x.abs().amax().reshape(1, 1) / (_ELEMENT.largest * _SCALE.largest)
        shared = torch.where(largest > 0, largest.clamp(min=2.0**-100), torch.ones_like(largest))
        return {"tensor_scale": shared, **self.start_group(x, {"tensor_scale": shared})}

    def start_group(self, x: Tensor, params: Params) -> Params:
        """Return the E4M3 number nearest to largest magnitude / 6, in units of the tensor's scale."""
        return self.with_factor(x.abs().amax(-1) / _ELEMENT.largest, params)

    def with_factor(self, factor: Tensor, params: Params) -> Params:
        """Store the nearest positive E4M3 number.

        Returns:
            "scale" (rows, groups), its code.
        """
        codes = _scales(factor.device).codes(factor / params["tensor_scale"])
        return {"scale": codes.clamp(min=1).to(torch.float32)}  # 0 is no scale

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the E4M3 scale and the fp32 scale of the tensor."""
        return Part("scale", self.grid(shape), 8), Part("tensor_scale", (1, 1), stored_as=torch.float32)


@cache
def _scales(device: torch.device) -> Table:
    return ElementTable("e4m3", device)
