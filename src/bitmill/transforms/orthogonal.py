"""Orthogonal: store every matrix in a basis turned by Kronecker products of small random orthogonal matrices.

Problem    outliers of weights and inputs set the range of a grid, and the rest get few levels
Equation   W -> U W V^T,  U and V = P1 (Q1 x Q2) P2, Q1 and Q2 Haar-random of about sqrt(n), P permutations
Needs      nothing; with `rescale` the Gram matrix
Cost       two transforms a layer at run time, O(n**1.5)
Source     QuIP (arXiv 2307.13304), section 4.1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats import Format
from bitmill.formats.rotated import Rotated
from bitmill.transforms.base import TRANSFORMS, FormatTransform


@TRANSFORMS.register("orthogonal")
@dataclass(frozen=True)
class Orthogonal(FormatTransform):
    """Random orthogonal basis of inputs, and of outputs unless `sides` is "in"."""

    seed: int = 0
    sides: Literal["both", "in"] = "both"
    rescale: bool = False

    def wrap(self, format: Format) -> Rotated:
        """Return the format in the rotated basis."""
        return Rotated(format, "orthogonal", self.seed, self.sides, self.rescale)
