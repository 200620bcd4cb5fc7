"""Shared: another format whose parts of fixed size are stored once for all layers of a kind.

Codebooks that are too expensive for one small matrix cost next to nothing when one linear of every block shares
them: two of 256 vectors of eight are 0.2 bits a weight of one 576 x 576 matrix, and 0.007 of thirty. They are
learned from all blocks before the first one is quantized, and never change afterwards.

A kind is the path of a linear inside its block, such as `self_attn.q_proj`. A layer keeps its codes and all other
parts of the inner format; a matrix alone is a kind of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import FORMATS
from bitmill.formats.part import Part
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
        """The shareable parts of the core."""
        return self.core.shareable

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return no parts: the wrapper only states that those of the inner format are shared."""
        return ()

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Return the problem unchanged; the solver takes the shared parts from `stats.shared`."""
        return Reduction(W, stats, lambda solved: replace(solved, format=self))
