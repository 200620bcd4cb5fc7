"""QuIP: quantization with incoherence processing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.half_integer import HalfInteger
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ
from bitmill.transforms.hadamard import Hadamard
from bitmill.transforms.orthogonal import Orthogonal


@METHODS.register("quip")
@dataclass(frozen=True)
class QuIP(Method):
    """QuIP: rotate weights and inputs by random orthogonal matrices, then LDLQ on one grid for the whole matrix.

    Problem    the error that adaptive rounding leaves grows with the largest weight, and with the concentration
               of the inputs' second moments on single channels; at 2 bits outliers decide
    Equation   W' = U W V^T, G' = V G V^T;  LDLQ: w^_j = round(w'_j + sum_{k<j} (w'_k - w^_k) L_kj);
               W^ = U^T W^' V
    Symbols    U, V products of two random orthogonal matrices of about sqrt(n) and permutations, from a seed;
               levels scale * (+-1/2, +-3/2, ...), one scale a matrix
    Stored     bits, and 16 bits a matrix; 16 bits a column with rescale
    Needs      the Gram matrix of every layer's inputs (calibration text)
    Cost       gptq's and two products with U and V; two rotations a layer at run time
    Expect     2 bits where gptq with one scale a row fails, without any scales of rows or groups
    Limits     the paper's range of 2.4 RMS (search=false) is wide for 2 bits: the range of least error serves
               better; rescaling columns, which the paper does, raised errors where some channels are very large
    Paper      Chee et al. 2023, "QuIP" (arXiv 2307.13304)
    """

    bits: int = option(2, "bits of a code, 1 to 8")
    rotation: Literal["orthogonal", "hadamard"] = option(
        "orthogonal", "the random basis: 'orthogonal' or 'hadamard'"
    )
    seed: int = option(0, "of the rotations")
    rescale: bool = option(False, "first balance the sizes of columns against those of their inputs")
    search: bool = option(True, "put the outermost level where the error is least; false: at 2.4 RMS")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")
    column_passes: int = option(0, "greedy rounds of re-rounding columns after the loop")

    def recipe(self) -> Recipe:
        """Return a recipe: half integers in a rotated basis, GPTQ solver in natural order, which is LDLQ."""
        turn = Orthogonal if self.rotation == "orthogonal" else Hadamard
        solver = GPTQ(self.damp, act_order=False, search=self.search, column_passes=self.column_passes)
        return Recipe("quip", HalfInteger(self.bits), solver, (turn(self.seed, rescale=self.rescale),))
