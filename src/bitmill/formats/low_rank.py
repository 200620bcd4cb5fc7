"""Low rank: another format for the matrix, plus a product of two thin ones that corrects its largest errors.

    W = inner + U V      U (rows, rank), V (rank, columns)

    low_rank_left   fp16 U
    low_rank_right  fp16 V

U V is the part of the error W - inner of this rank that changes the outputs most: with the factor L of the Gram
matrix of the inputs, G = L L^T, the best approximation of (W - inner) L; without statistics that of the error
itself. Where inputs are quantized it multiplies rounded inputs, as the inner matrix does. Bits a weight: the inner
format's, and 16 rank (rows + columns) / (rows * columns).

Source: LoRC, in ZeroQuant-V2 (Yao et al. 2023, arXiv 2303.08302), section 5, where the error is unweighted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params
from bitmill.formats.fitting import FP16_MAX, as_stored
from bitmill.formats.part import Part
from bitmill.formats.quantized import Quantized
from bitmill.formats.wrapper import Reduction, Wrapper
from bitmill.numerics.statistics import Statistics

_DAMP = 0.01  # share of the mean diagonal


@FORMATS.register("low_rank")
@dataclass(frozen=True)
class LowRank(Wrapper):
    """The inner format plus a product of rank `rank` in fp16."""

    rank: int = 8
    weighted: bool = True

    largest: ClassVar[float] = FP16_MAX

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"rank is {self.rank!r}; use 1 or more, or the inner format alone for none.")

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrix of the inputs, with weighted."""
        return self.inner.needs | (frozenset({"gram"}) if self.weighted else frozenset())

    def uncompiled_reason(self, columns: int) -> str | None:
        """Return a reason where inputs are rounded."""
        if self.quantizes_inputs:
            return "the product of low rank multiplies rounded inputs"
        return self.inner.uncompiled_reason(columns)

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return both factors."""
        rank = min(self.rank, *shape)
        return Part("low_rank_left", (shape[0], rank)), Part("low_rank_right", (rank, shape[1]))

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Leave the matrix as it is, and fit the product to the error of the solution.

        Raises:
            NumericsError: with weighted, when there is no Gram matrix.
        """
        L = _factor(stats.required_gram(self.name)) if self.weighted else None

        def finish(solved: Quantized) -> Quantized:
            left, right = _best(W - solved.dequantize(), L, self.rank)
            own = {"low_rank_left": as_stored(left), "low_rank_right": as_stored(right)}
            return replace(solved, format=self, params={**solved.params, **own})

        return Reduction(W, stats, finish)

    def assemble(self, inner: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Add the product."""
        return inner + params["low_rank_left"] @ params["low_rank_right"]


def _factor(gram: Tensor) -> Tensor:
    """Return the lower factor of a damped Gram matrix, in fp64."""
    G = gram.double()
    G.diagonal().add_(_DAMP * G.diagonal().mean() + 1e-30)
    return torch.linalg.cholesky(G)


def _best(error: Tensor, L: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the product of a rank that leaves least of an error, of equal magnitudes."""
    target = error.double() if L is None else error.double() @ L
    U, S, V = torch.linalg.svd(target, full_matrices=False)
    root = S[:rank].sqrt()
    left, right = U[:, :rank] * root, root[:, None] * V[:rank]
    if L is not None:
        right = torch.linalg.solve_triangular(L, right, upper=False, left=False)
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-15)
        left, right = left * balance, right / balance[:, None]
    return left.float(), right.float()
