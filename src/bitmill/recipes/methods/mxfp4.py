"""MXFP4: 4-bit floats that share a power of two."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.microscaling import Microscaling
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("mxfp4")
@dataclass(frozen=True)
class MXFP4(Method):
    """The 4-bit format of the OCP microscaling standard: E2M1 numbers, one power of two per 32.

    Problem    4-bit weights in an open number type that hardware of several makers multiplies
    Equation   W^ = 2^(s - 127) * e2m1(code), s - 127 = floor(log2(max |W|)) - 2
    Symbols    e2m1 one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; s one byte a group (E8M0)
    Stored     4-bit codes, 8 bits a group: 4.25 bits per weight
    Needs      nothing: no text, no forward pass
    Cost       seconds; memory of one block
    Expect     a larger error than nvfp4, nf4 or a uniform grid at a similar number of bits: a power of two
               fits a group badly, and the rule above clips numbers beyond 6
    Limits     groups of 32 in the standard; other sizes can be stored, and no hardware reads them
    Paper      OCP Microscaling Formats (MX) Specification 1.0; Rouhani et al. 2023 (arXiv 2310.10537)
    """

    group_size: GroupSize = option(32, "input columns that share a power of two; 32 in the standard")
    search: bool = option(False, "also try half and twice the power of two of the standard's rule")

    def recipe(self) -> Recipe:
        """Return a recipe: microscaling format, nearest solver."""
        return Recipe("mxfp4", Microscaling(4, self.group_size), Nearest(search=self.search))
