"""QTIP: trellis codes in a Hadamard basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitmill.formats.trellis import Trellis
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptaq import GPTAQ
from bitmill.transforms.hadamard import Hadamard


@METHODS.register("qtip")
@dataclass(frozen=True)
class QTIP(Method):
    """QTIP: a randomized Hadamard basis, 64 weights at a time as a path through a trellis, block LDLQ.

    Problem    codebooks of vectors grow exponentially with their width, and narrow ones leave a third of the error
    Equation   w^_t = scale * level(state_t);  state_t the last state_bits bits of a circular stream, to which
               every weight adds its bits;  the stream by the Viterbi algorithm;  blocks feed their error on, as in
               quip_sharp
    Symbols    level: bytes of a linear congruential generator of the state, summed: nearly Gaussian, no codebook
    Stored     bits, and an fp16 scale a row
    Needs      the Gram matrix of every layer's inputs and, with alpha, their cross-Gram with the float model's
               (calibration text)
    Cost       encoding: 0.8 M weights a second and core with state_bits=12, half as many for each bit more, and
               three searches more a block; a pass more costs as much again. Two rotations a layer at run time,
               and blocks decoded to fp32
    Expect     2 bits: a squared error a sixth below quip_sharp's lattice on Gaussian weights, at equal bits
    Limits     1 to 4 bits; a stream runs along a row, the paper's over 16 rows by 16 columns, whose narrower
               blocks feed errors on sooner: with few columns of strongly correlated inputs quip_sharp is ahead;
               its fine-tuning is not here; alpha is not in it
    Paper      Tseng et al. 2024, "QTIP" (arXiv 2406.11235); alpha after GPTAQ (arXiv 2504.02692)
    """

    bits: int = option(2, "bits a weight, 1 to 4")
    state_bits: int = option(12, "bits of a state, 8 to 16: more lower the error and double the time each")
    seed: int = option(0, "of the signs")
    sides: Literal["both", "in"] = option("both", "rotate inputs and outputs, or inputs alone")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")
    act_order: bool = option(False, "visit blocks by falling mean square of their inputs")
    column_passes: int = option(1, "rounds of re-rounding blocks after the loop")
    alpha: float = option(0.5, "share of the correction for errors of earlier layers in the inputs; 0 for none")

    def recipe(self) -> Recipe:
        """Return a recipe: trellis codes in a Hadamard basis, GPTAQ solver by blocks."""
        solver = GPTAQ(self.damp, self.act_order, search=False, column_passes=self.column_passes, alpha=self.alpha)
        format = Trellis(self.bits, state_bits=self.state_bits)
        return Recipe("qtip", format, solver, (Hadamard(self.seed, self.sides),))
