"""AQLM: additive quantization with learned codebooks, fitted to the outputs of layers and of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.errors import RecipeError
from bitmill.formats.additive import Additive
from bitmill.formats.base import Format
from bitmill.formats.shared import Shared
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.beam import BeamSearch
from bitmill.transforms.permute import Permute
from bitmill.tuners.block_finetune import BlockFinetune


@METHODS.register("aqlm")
@dataclass(frozen=True)
class AQLM(Method):
    """AQLM: blocks of eight weights as sums of vectors from codebooks learned for each layer.

    Problem    at 2 to 3 bits single weights have too few levels; eight weights at once can share 2**16 points
    Equation   w^ = s sum_m C_m[b_m], b_m of `codebook_bits` bits; codes by beam search, codebooks and scales by
               least squares, in turns, all on tr((W - W^) H (W - W^)^T), H the damped Gram of the inputs; then
               codebooks, scales and norms by Adam on the distance of each block's output to the float block's
    Symbols    s scale of a row, C_m a codebook of 2**codebook_bits vectors, M = 8 bits / codebook_bits of them
    Needs      the Gram matrix of every layer's inputs, the cross-Gram with the float model's, and the float
               blocks' outputs (calibration text)
    Stored     M codes for eight weights; for every layer fp16 scales, M fp16 codebooks and an order of the
               columns: bits + 128 M 2**codebook_bits/(rows columns) + 16/columns + log2(columns)/rows; with
               `shared` the codebooks once for the corresponding layers of all blocks (all q_proj, all k_proj, ...)
    Cost       the most expensive of the methods here: minutes of one core for ten million weights
    Expect     below every scalar method at its bits
    Limits     no codebook beyond 8 bits, so not the paper's 1x16, which would be several times the codes of a
               small model; small layers need small codebooks: bits=2.25 codebook_bits=6 is three of 64 vectors;
               shared codebooks are learned from float weights before the first block, and no block tunes them
    Changed    codes start from error feedback, least squares takes the place of Adam, columns are dealt to blocks
               by importance (permute=false leaves them in place), alpha, shared
    Paper      AQLM (arXiv 2401.06118); alpha after GPTAQ (arXiv 2504.02692)
    """

    bits: float = option(2, "bits of the codes for one weight: times 8, a multiple of codebook_bits")
    codebook_bits: int = option(8, "bits of one code, 1 to 8; a codebook has 2**codebook_bits vectors")
    shared: bool = option(False, "one set of codebooks for the like layers of all blocks, learned beforehand")
    permute: bool = option(True, "deal columns to blocks by importance")
    beam: int = option(8, "hypotheses kept in the search of a block, a power of two")
    rounds: int = option(16, "rounds of training the codebooks on samples of rows")
    sweeps: int = option(4, "searches of all blocks after the first, at most")
    damp: float = option(0.05, "share of the Gram's mean diagonal added to its diagonal")
    alpha: float = option(0.5, "share of the correction for errors of earlier layers in the inputs; 0 for none")
    epochs: int = option(3, "passes of block fine-tuning over the calibration text; 0 for none")

    def recipe(self) -> Recipe:
        """Return a recipe: additive format, beam search, block fine-tuning."""
        books = self.bits * Additive.block / max(self.codebook_bits, 1)
        if books != int(books) or books < 1:
            raise RecipeError(
                f"bits is {self.bits!r} and codebook_bits {self.codebook_bits!r}; eight times bits must be a "
                "multiple of codebook_bits, as with 2 and 8, or 2.25 and 6."
            )
        format: Format = Additive(self.codebook_bits, "row", int(books))
        if self.shared:
            format = Shared(format)
        solver = BeamSearch(self.beam, self.sweeps, rounds=self.rounds, damp=self.damp, alpha=self.alpha)
        tuners = (BlockFinetune(epochs=self.epochs),) if self.epochs else ()
        return Recipe("aqlm", format, solver, (Permute(),) if self.permute else (), tuners=tuners)
