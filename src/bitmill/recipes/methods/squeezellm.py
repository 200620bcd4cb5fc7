"""SqueezeLLM: sensitivity-weighted levels, with the hardest weights in a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.formats import Format
from bitmill.formats.codebook import Codebook
from bitmill.formats.sum import Sum
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest


@METHODS.register("squeezellm")
@dataclass(frozen=True)
class SqueezeLLM(Method):
    """SqueezeLLM: k-means weighted by the loss's squared gradients, and the few hardest weights kept in fp16.

    Problem    evenly spaced levels are spent where weights are few, or where the loss is insensitive; outliers
               stretch the rest
    Equation   per row min sum_j F_j (w_j - c(w_j))^2 over 2^bits free levels c;   W^ = dense + sparse
    Symbols    F mean over windows of (d loss / d w)^2, the diagonal of the Fisher information
    Search     the levels by dynamic programming on the sorted row instead of Lloyd's iterations; sparse are the
               weights of largest F, then those of largest magnitude, an exact count of each, where the paper
               tunes a threshold
    Stored     codes, 2^bits fp16 levels a row, and for each sparse weight fp16 and a 16-bit column:
               bits + 16 * 2^bits / columns, and 0.14 + 16 / columns for 0.45 % sparse weights
    Needs      one backward pass of the float model for each of at most 100 windows of calibration text, block
               by block; with fisher=false nothing
    Cost       about five forward passes over these windows, and disk for the inputs of every block meanwhile
    Expect     3 bits on a small model: without the gradients it breaks, with them and the sparse weights it is
               usable; error feedback in this format is ahead of it, see the solver gptq
    Limits     layers see the float model's inputs, not those of the quantized blocks before them
    Paper      Kim et al. 2023 (arXiv 2306.07629)
    """

    bits: int = option(3, "bits of a code, 1 to 8")
    outliers: float = option(0.004, "share of weights kept in fp16 for their magnitude")
    sensitive: float = option(0.0005, "share of weights kept in fp16 because the loss is most sensitive to them")
    fisher: bool = option(True, "weight errors by squared gradients of the loss; false needs no text")

    def recipe(self) -> Recipe:
        """Return a recipe: codebook, alone or in a sum with sparse weights; nearest solver."""
        format: Format = Codebook(self.bits)
        if self.outliers or self.sensitive:
            format = Sum(format, self.outliers, self.sensitive)
        return Recipe("squeezellm", format, Nearest(search=True, weighted="fisher" if self.fisher else "nothing"))
