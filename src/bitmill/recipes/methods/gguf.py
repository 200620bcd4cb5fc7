"""GGUF: the block types of llama.cpp, with codes and scales chosen by GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

from bitmill.errors import RecipeError
from bitmill.formats.gguf_types import GGUF_TYPES
from bitmill.recipes.method import METHODS, Method, option
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.gptq import GPTQ


@METHODS.register("gguf")
@dataclass(frozen=True)
class GGUF(Method):
    """GPTQ on the grids of GGUF's block types, which `bitmill export --to gguf` writes as they are.

    Problem    files for llama.cpp whose codes account for the inputs of the layers
    Equation   K-types: W^ = (d s) code - (dmin m), s and m integers of a group, d and dmin fp16 of 256 columns
    Choice     s, m, d and dmin by search and weighted least squares, then codes by error feedback (GPTQ)
    Fallback   rows that are no multiple of 256 columns take the type that llama.cpp takes: IQ4_NL for Q2_K, Q3_K
               and IQ4_XS, Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K; a sentence says for how many layers
    Needs      the Gram matrix G of every layer's inputs (calibration text)
    Cost       as gptq, and a longer search of scales
    Expect     a smaller error of each layer than llama.cpp's own file of the type with its importance matrix
    Limits     embedding and head are rounded to nearest, as Q8_0
    Paper      llama.cpp, ggml/src/ggml-quants.c; Frantar et al. 2022 (arXiv 2210.17323) for the solver
    """

    type: str = option("Q4_K", "block type: Q2_K to Q6_K, IQ4_XS, IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or MXFP4")
    damp: float = option(0.01, "share of the Gram's mean diagonal added to its diagonal")
    act_order: bool = option(True, "visit columns by falling mean square of their input")
    importance: str = option("inverse", "weight of a column's error in the search: 'diagonal' or 'inverse'")
    column_passes: int = option(0, "rounds of re-rounding columns after the loop")
    group_passes: int = option(0, "rounds of refitting groups after the loop, at the scales of their super-blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type not in GGUF_TYPES:
            raise RecipeError(f"type is {self.type!r}; use one of {', '.join(GGUF_TYPES)}.")

    def recipe(self) -> Recipe:
        """Return a recipe: the format of the type, GPTQ solver."""
        solver = GPTQ(
            damp=self.damp,
            act_order=self.act_order,
            importance=self.importance,  # type: ignore[arg-type]
            column_passes=self.column_passes,
            group_passes=self.group_passes,
        )
        return Recipe("gguf", GGUF_TYPES[self.type], solver, head=GGUF_TYPES["Q8_0"])
