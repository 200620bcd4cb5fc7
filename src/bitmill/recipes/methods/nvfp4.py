"""NVFP4: 4-bit floats with 8-bit floating-point scales."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.nvfp4 import NVFP4
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("nvfp4")
@dataclass(frozen=True)
class NVFP4Method(Method):
    """NVIDIA's 4-bit format: E2M1 numbers, an E4M3 scale per 16, one fp32 scale a tensor.

    Problem    4-bit weights that tensor cores multiply, with finer scales than powers of two
    Equation   W^ = t * e4m3(s) * e2m1(code), t = max |W| / (6 * 448), e4m3(s) nearest to max |W_group| / (6 t)
    Symbols    e2m1 one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; s one byte a group; t one a tensor
    Stored     4-bit codes, 8 bits a group, 32 bits a tensor: 4.50 bits per weight
    Needs      nothing: no text, no forward pass
    Cost       seconds; memory of one block
    Expect     a clearly smaller error than mxfp4, for a quarter of a bit more; with search=true smaller again
    Limits     groups of 16 in the hardware; other sizes can be stored, and no hardware reads them
    Paper      NVIDIA 2025, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149)
    """

    group_size: GroupSize = option(16, "input columns that share an 8-bit scale; 16 in the hardware")
    search: bool = option(False, "try neighbouring scales for the least squared weight error")

    def recipe(self) -> Recipe:
        """Return a recipe: NVFP4 format, nearest solver."""
        return Recipe("nvfp4", NVFP4(4, self.group_size), Nearest(search=self.search))
