"""GPTQT: quantize twice, to a linear grid and then to binary coding."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats.integer_coding import IntegerCoding
from bitmill.numerics.grouping import GroupSize
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptaq import GPTAQ


@METHODS.register("gptqt")
@dataclass(frozen=True)
class GPTQT(Method):
    """GPTQT: linear quantization to more bits, then binary coding of the integers, inside error feedback.

    Problem    binary coding that minimises the weight error alone overfits the weights: the output suffers
    Equation   levels = S (base + sum_i d_i c_i), c_i in {0, 1}, integers on an n-bit grid; equal to
               beta + sum_i alpha_i b_i with alpha_i = S d_i / 2, beta = S (base + sum d / 2)
    Symbols    S scale of a group, n grid_bits, d_i the integer steps, m = bits of the code
    Search     base, d and a re-explored S are chosen together, exactly, by the cost of the group's histogram
               on the grid, each column weighted by the cost of an error there once others compensate;
               after the GPTQ loop, groups are refitted and columns re-rounded in the metric of the output;
               each layer is first corrected for the errors of earlier layers in its inputs
    Stored     m-bit codes, per group an index of the coding and an exponent of the scale (one byte), fp16 a
               row: m + 8/32 + 16/columns bits per weight by default
    Needs      the Gram matrix of every layer's inputs and, with alpha, their cross-Gram with the float model's
               (calibration text)
    Cost       GPTQ's, about as much again for the search and the passes, and one more forward pass with alpha
    Expect     3 bits between gptq's 3 and 4; 2 bits about one and a half times the float perplexity on a
               135M model
    Limits     1 to 4 bits; the paper's body is not public, so grid, search and storage are reconstructions; the
               passes and alpha are not in it
    Paper      GPTQT (arXiv 2407.02891); alpha after GPTAQ (arXiv 2504.02692)
    """

    bits: int = option(3, "binary planes, 1 to 4")
    group_size: GroupSize = option(32, "input columns that share a coding and an exponent, or 'row'")
    grid_bits: int = option(5, "bits of the intermediate linear grid")
    codings: int = option(32, "size of the list of codings, a power of two up to 64")
    scale_bits: int = option(3, "bits of a group's exponent")
    scale_step: float = option(0.2, "octaves between two exponents")
    damp: float = option(0.03, "share of the Gram's mean diagonal added to its diagonal")
    act_order: bool = option(True, "visit columns by falling mean square of their input")
    search: bool = option(True, "re-explore the scale and choose the coding; false takes the first coding")
    importance: str = option("inverse", "weight of a column's error in the search: 'inverse' or 'diagonal'")
    group_passes: int = option(1, "rounds of refitting groups after the loop")
    column_passes: int = option(2, "rounds of re-rounding columns after the loop")
    alpha: float = option(0.5, "share of the correction for errors of earlier layers in the inputs; 0 for none")

    def recipe(self) -> Recipe:
        """Return a recipe: integer coding, GPTAQ solver with descent."""
        format = IntegerCoding(
            self.bits, self.group_size, self.grid_bits, self.codings, self.scale_bits, self.scale_step
        )
        solver = GPTAQ(
            damp=self.damp,
            act_order=self.act_order,
            search=self.search,
            importance=self.importance,  # type: ignore[arg-type]
            column_passes=self.column_passes,
            group_passes=self.group_passes,
            alpha=self.alpha,
        )
        return Recipe("gptqt", format, solver)
