"""Shared: another format whose parts of fixed size are stored once for all layers of a kind.

Codebooks that a small matrix cannot pay for cost next to nothing when the same linear of every block uses them:
two of 256 vectors of eight are 0.2 bits a weight of one 576 x 576 matrix, and 0.007 of thirty. They are learned
from all blocks before the first one is quantized, and nobody changes them afterwards.

A kind is the path of a linear inside its block, such as `self_attn.q_proj`. A layer keeps its codes and all other
parts of the inner format; a matrix alone is a kind of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS, Params, Part
from bitmill.formats.wrapper import Reduction, Wrapper
from bitmill.numerics.statistics import Statistics


@FORMATS.register("shared")
@dataclass(frozen=True)
class Shared(Wrapper):
    """The inner format, with its `shareable` parts shared by all layers of a kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.core.shareable:
            raise RecipeError(f"{self.core.name} has no parts that layers could share; use it without `shared`.")

    @property
    def shared(self) -> frozenset[str]:
        """Those of the core."""
        return self.core.shareable

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """None: it only says where the inner format's are."""
        return ()

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Return the problem unchanged; the solver takes the shared parts from `stats.shared`."""
        return Reduction(W, stats, lambda solved: replace(solved, format=self))

    def dequantize(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """The inner matrix."""
        return self.inner.dequantize(codes, params, shape)
