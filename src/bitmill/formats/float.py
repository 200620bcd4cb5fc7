"""Float: floating-point numbers of 4, 6 or 8 bits times a scale, W^ = scale * element(code).

    code   a sign, an exponent and a mantissa, see numerics/minifloat.py
    scale  fp16, one a group; fp32 with scale_type="float32", which imported codes may need

Bits a weight: bits + 16/group_size.

Sources: OCP 8-bit Floating Point Specification 1.0 (e4m3, e5m2); Micikevicius et al. 2022, "FP8 Formats for
Deep Learning" (arXiv 2209.05433), section 3.1, for the scale that maps the largest magnitude to the largest
number; OCP Microscaling Formats Specification 1.0 (e3m2, e2m3, e2m1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS
from bitmill.formats.part import SCALE_TYPES, Part, ScaleType
from bitmill.formats.scaled import FloatScaled, Scaled
from bitmill.numerics.minifloat import ELEMENTS, ElementName, ElementTable
from bitmill.numerics.table import Table


@dataclass(frozen=True)
class Elements(Scaled):
    """Base of the formats whose table is an element type; `bits` must be the element's."""

    element: ElementName = "e4m3"

    @classmethod
    def default_bits(cls, given: Mapping[str, Any]) -> int:
        """Return the bits of the element."""
        element = ELEMENTS.get(str(given.get("element", cls.element)))
        return super().default_bits(given) if element is None else element.bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != ELEMENTS[self.element].bits:
            raise RecipeError(
                f"bits is {self.bits!r}, but {self.element} has {ELEMENTS[self.element].bits}; change one of them."
            )

    def table(self, device: torch.device) -> Table:
        """Return the element of every code."""
        return ElementTable(self.element, device)


@FORMATS.register("float")
@dataclass(frozen=True)
class Float(FloatScaled, Elements):
    """Small floating-point numbers with one scale per tensor, row or group."""

    scale_type: ScaleType = "float16"

    left_out: ClassVar[dict[str, Any]] = {"scale_type": "float16"}
    shares: ClassVar[tuple[float, ...]] = tuple(1 + k / 20 for k in (*range(-8, 0), 1, 2, 4, 6, 8, 10))

    @property
    def arithmetic(self) -> Literal["float"]:
        """Floats: products of 8 bits are exact in fp32."""
        return "float"

    @property
    def largest(self) -> float:
        """Largest number of the element."""
        return ELEMENTS[self.element].largest

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the scale."""
        return (Part("scale", self.grid(shape), stored_as=SCALE_TYPES[self.scale_type]),)
