"""Hadamard: store every matrix in a basis turned by seeded signs and a Hadamard transform.

Problem    outliers of weights and inputs set the range of a grid, and the rest get few levels
Equation   W -> U W V^T,  U and V = H diag(+-1) / sqrt(n), for any n
Needs      nothing
Cost       two transforms a layer at run time, O(n log n)
Source     QuIP# (arXiv 2402.04396), section 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats import Format
from bitmill.formats.rotated import Rotated
from bitmill.transforms.base import TRANSFORMS, FormatTransform


@TRANSFORMS.register("hadamard")
@dataclass(frozen=True)
class Hadamard(FormatTransform):
    """Randomized Hadamard transform of inputs, and of outputs unless `sides` is "in"."""

    seed: int = 0
    sides: Literal["both", "in"] = "both"
    rescale: bool = False

    def wrap(self, format: Format) -> Rotated:
        """Return the format in the rotated basis."""
        return Rotated(format, "hadamard", self.seed, self.sides, self.rescale)
