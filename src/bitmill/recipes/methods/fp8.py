"""FP8: 8-bit floating-point weights."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.float import Float
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("fp8")
@dataclass(frozen=True)
class FP8(Method):
    """8-bit floating-point numbers with one scale a row, as recent GPUs multiply them.

    Problem    half the bytes of bf16, in a number type that tensor cores read
    Equation   W^ = scale * e4m3(code), scale = max |W| of the row / 448
    Symbols    e4m3 one sign bit, 4 of exponent, 3 of mantissa, largest number 448; e5m2 trades a bit of
               mantissa for one of exponent, largest number 57344
    Stored     8-bit codes, fp16 a row: 8.01 bits per weight at 2048 columns
    Needs      nothing: no text, no forward pass
    Cost       seconds; memory of one block
    Expect     close to float; the error of 8-bit integers with equal scales is far smaller, because
               weights of one row rarely span the octaves that the exponent provides
    Limits     weights only: activations stay in float
    Paper      Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433)
    """

    element: str = option("e4m3", "e4m3, or e5m2")
    group_size: GroupSize = option("row", "input columns that share a scale, or 'row' or 'tensor'")
    search: bool = option(False, "try other scales for the least squared weight error")

    def recipe(self) -> Recipe:
        """Return a recipe: float format, nearest solver."""
        format = Float(8, self.group_size, self.element)  # type: ignore[arg-type]
        return Recipe("fp8", format, Nearest(search=self.search))
