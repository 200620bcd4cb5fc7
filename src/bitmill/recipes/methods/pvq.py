"""PVQ: pyramid vector quantization of language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.pyramid import Pyramid
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptaq import GPTAQ
from bitmill.transforms.hadamard import Hadamard


@METHODS.register("pvq")
@dataclass(frozen=True)
class PVQ(Method):
    """PVQ: in a Hadamard basis, the direction of sixteen weights as an integer point, and a 4-bit length.

    Problem    vector codebooks must be stored, trained and searched; a pyramid of integer points is none of these
    Equation   w^ = scale * length * y / |y|,  y integers with sum |y_i| = K;  y by the largest cosine to w
    Symbols    K pulses: 4, 12, 27, 58 for 1, 2, 3, 4 bits of direction; scale the RMS of a row; lengths the
               sixteen of least error for Gaussian weights
    Stored     bits + 1/4 + 16/columns: the number of y, 4 bits of length, an fp16 scale a row; no codebook
    Needs      the Gram matrix of every layer's inputs and, with alpha, their cross-Gram with the float model's
               (calibration text)
    Cost       two to three times gptq's; a pass more costs as much again. Two rotations a layer at run time,
               and unpacking numbers into points
    Expect     errors well below gptq with groups at the same bits
    Limits     1 to 4 bits; of the paper only the outline is public, so block width, bits of the length and
               feedback between blocks (block LDLQ) are reconstructions; alpha is not in it
    Paper      PVQ for LLMs (arXiv 2410.16926); Fischer 1986, "A pyramid vector quantizer"; alpha after GPTAQ
               (arXiv 2504.02692)
    """

    bits: int = option(3, "bits a weight of the direction, 1 to 4; the length takes another quarter of a bit")
    seed: int = option(0, "of the signs")
    sides: Literal["both", "in"] = option("both", "rotate inputs and outputs, or inputs alone")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")
    act_order: bool = option(False, "visit blocks by falling mean square of their inputs")
    column_passes: int = option(1, "rounds of re-rounding blocks after the loop")
    alpha: float = option(0.5, "share of the correction for errors of earlier layers in the inputs; 0 for none")

    def recipe(self) -> Recipe:
        """Return a recipe: pyramid codes in a Hadamard basis, GPTAQ solver by blocks."""
        solver = GPTAQ(self.damp, self.act_order, search=False, column_passes=self.column_passes, alpha=self.alpha)
        return Recipe("pvq", Pyramid(self.bits), solver, (Hadamard(self.seed, self.sides),))
