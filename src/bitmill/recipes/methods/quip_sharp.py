"""QuIP#: lattice codebooks in a Hadamard basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.e8 import E8
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptaq import GPTAQ
from bitmill.transforms.hadamard import Hadamard


@METHODS.register("quip_sharp")
@dataclass(frozen=True)
class QuIPSharp(Method):
    """QuIP#: a randomized Hadamard basis, eight weights at a time on the E8 lattice, block LDLQ.

    Problem    in a random basis weights are Gaussian, and a grid of single numbers wastes a fifth of a bit
    Equation   W' = U W V^T,  U, V = H diag(+-1) / sqrt(n);  blocks B of 8 columns, G'^-1 = R^T R:
               w^_B = nearest of 65536 lattice points,  w_rest -= (w_B - w^_B) R_BB^-1 R_B,rest
    Symbols    H Hadamard matrices (any width, see the format `rotated`), R upper triangular
    Stored     16 bits for 8 weights and 16 bits a matrix: 2 bits; no codebook
    Needs      the Gram matrix of every layer's inputs and, with alpha, their cross-Gram with the float model's
               (calibration text)
    Cost       about twice gptq's; a pass more costs as much again. Two rotations a layer at run time
    Expect     a smaller error than any method on scalar levels with as few bits on disk
    Limits     2 bits; the paper's residual codebooks for 3 and 4 bits and its fine-tuning are not here; which
               29 of the lattice points of norm 12 are used is this program's choice, and so is alpha
    Paper      Tseng et al. 2024, "QuIP#" (arXiv 2402.04396); alpha after GPTAQ (arXiv 2504.02692)
    """

    seed: int = option(0, "of the signs")
    sides: Literal["both", "in"] = option("both", "rotate inputs and outputs, or inputs alone with a scale a row")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")
    act_order: bool = option(False, "visit blocks by falling mean square of their inputs")
    column_passes: int = option(1, "rounds of re-rounding blocks after the loop")
    alpha: float = option(0.5, "share of the correction for errors of earlier layers in the inputs; 0 for none")

    def recipe(self) -> Recipe:
        """Return a recipe: E8 codes in a Hadamard basis, GPTAQ solver by blocks."""
        format = E8(2, "tensor" if self.sides == "both" else "row")
        solver = GPTAQ(self.damp, self.act_order, search=False, column_passes=self.column_passes, alpha=self.alpha)
        return Recipe("quip_sharp", format, solver, (Hadamard(self.seed, self.sides),))
