"""Formats around another format: the matrix is stored as the inner one's codes, plus parts of the wrapper.

A wrapper says how a matrix is solved when somebody knows how to solve the inner format (`solve`), and how the
whole decodes. Solvers never see one: `bitmill.solvers.solve` peels wrappers off, outermost first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitmill.formats.base import Format, Params, Part
from bitmill.formats.grouped import GroupFormat

if TYPE_CHECKING:
    from bitmill.formats.quantized import Quantized

# (W (rows, columns), statistics) -> Quantized in the inner format
InnerSolve = Callable[[Tensor, Any], "Quantized"]


@dataclass(frozen=True)
class Wrapper(Format):
    """Base of wrappers. Parts of the inner format keep their names; `own_parts` must not clash with them."""

    inner: Format

    @property
    def core(self) -> GroupFormat:
        """The innermost format."""
        return self.inner.core

    @property
    def needs(self) -> frozenset[str]:
        """The inner format's; a wrapper adds its own."""
        return self.inner.needs

    @property
    def shared(self) -> frozenset[str]:
        """The inner format's."""
        return self.inner.shared

    @property
    def bits(self) -> int:
        """Bits of the core's code for one weight."""
        return self.core.bits

    @property
    def stackable(self) -> bool:
        """Wrappers act on a layer's own matrix, unless they say otherwise."""
        return False

    @property
    def code_bits(self) -> int:
        """The inner format's."""
        return self.inner.code_bits

    def codes_in(self, columns: int) -> int:
        """The inner format's."""
        return self.inner.codes_in(columns)

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """The inner format's, and the wrapper's own."""
        return (*self.inner.parts(shape), *self.own_parts(shape))

    @abstractmethod
    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """What the wrapper stores besides."""

    @abstractmethod
    def solve(self, W: Tensor, stats: Any, solve_inner: InnerSolve) -> Quantized:
        """Quantize W (rows, columns) with what `solve_inner` makes of the matrix it is handed.

        stats: `solvers.Statistics` of the layer's inputs.
        """

    def inner_params(self, params: Params, shape: tuple[int, int]) -> Params:
        """Those of the params that belong to the inner format."""
        own = {part.name for part in self.own_parts(shape)}
        return {name: value for name, value in params.items() if name not in own}
