"""Formats around another format: the matrix is stored as the inner format's codes, plus parts of the wrapper.

A wrapper states how it reduces the problem of quantizing a matrix to that of its inner format (`reduce`), and how
the whole decodes. Solvers never see one: `bitmill.solvers.base.solve` removes wrappers, outermost first.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from bitmill.formats.base import Format, GroupFormat, Params
from bitmill.formats.part import Part, not_finite
from bitmill.formats.quantized import Quantized
from bitmill.numerics.statistics import Statistics


@dataclass(frozen=True)
class Reduction:
    """The problem of a wrapper's inner format.

    W       the matrix to be solved in the inner format, fp32 (rows, columns)
    stats   its statistics
    finish  maps the solution, a `Quantized` of the inner format, to that of the wrapper
    """

    W: Tensor
    stats: Statistics
    finish: Callable[[Quantized], Quantized]


@dataclass(frozen=True)
class Wrapper(Format):
    """Base of wrappers. Parts of the inner format keep their names; `own_parts` must not clash with them."""

    inner: Format

    largest: ClassVar[float] = math.inf  # magnitude that the wrapper's own parts store

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
    def quantizes_inputs(self) -> bool:
        """True where the inner format does."""
        return self.inner.quantizes_inputs

    def of_network(self, matrices: Callable[[], Iterable[Tensor]]) -> Format:
        """Return the wrapper around the inner format's."""
        inner = self.inner.of_network(matrices)
        return self if inner is self.inner else replace(self, inner=inner)

    def effective_inputs(self, x: Tensor, params: Params) -> Tensor:
        """Return the inner format's; a wrapper that changes the basis of the inputs overrides it."""
        return self.inner.effective_inputs(x, params)

    def uncompiled_reason(self, columns: int) -> str | None:
        """Return the inner format's; a wrapper whose own parts multiply rounded inputs overrides it."""
        return self.inner.uncompiled_reason(columns)

    @property
    def bits(self) -> int:
        """Bits of the core's code for one weight."""
        return self.core.bits

    @property
    def stackable(self) -> bool:
        """False unless a wrapper overrides it: wrappers act on a layer's own matrix."""
        return False

    @property
    def code_bits(self) -> int:
        """The inner format's."""
        return self.inner.code_bits

    def codes_in(self, columns: int) -> int:
        """Return the inner format's."""
        return self.inner.codes_in(columns)

    def inner_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the inner matrix of a matrix of `shape`."""
        return shape

    def parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the inner format's parts and the wrapper's own."""
        return (*self.inner.parts(self.inner_shape(shape)), *self.own_parts(shape))

    @abstractmethod
    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the parts that the wrapper adds to those of the inner format."""

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return the inner format's; a wrapper adds what its own parts cannot hold."""
        own = {part.name for part in self.own_parts(shape)}
        inner = {name: tensor for name, tensor in tensors.items() if name not in own}
        mine = {name: tensor for name, tensor in tensors.items() if name in own}
        return self.inner.damage_reason(inner, self.inner_shape(shape)) or not_finite(mine)

    @property
    def learned_integers(self) -> frozenset[str]:
        """The inner format's."""
        return self.inner.learned_integers

    def inner_matrix(self, W: Tensor, params: Params) -> Tensor:
        """Return the exact inner matrix of W under fixed parts of the wrapper, with gradients.

        Args:
            W: fp32 (rows, columns).
            params: of the wrapper.
        """
        return W

    def assemble(self, inner: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Return the matrix fp32 of `shape` from the decoded inner matrix; with gradients.

        Args:
            inner: fp32, of `inner_shape`.
            params: of the wrapper.
            shape: (rows, columns).
        """
        return inner

    def nearest_codes(self, W: Tensor, params: Params) -> Tensor:
        """Return the inner format's codes of the inner matrix."""
        shape = (W.shape[0], W.shape[1])
        return self.inner.nearest_codes(self.inner_matrix(W, params), self.inner_params(params, shape))

    def fake_quantize(self, W: Tensor, params: Params) -> Tensor:
        """Return the matrix assembled from the rounded inner matrix, with gradients."""
        shape = (W.shape[0], W.shape[1])
        inner = self.inner.fake_quantize(self.inner_matrix(W, params), self.inner_params(params, shape))
        return self.assemble(inner, params, shape)

    def dequantize(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Decode the inner matrix, and assemble the matrix from it."""
        known = self.inner_params(params, shape)
        return self.assemble(self.inner.dequantize(codes, known, self.inner_shape(shape)), params, shape)

    @abstractmethod
    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Reduce the quantization of a matrix to that of the inner format.

        Args:
            W: fp32 (rows, columns).
            stats: statistics of the layer.
        """

    def inner_params(self, params: Params, shape: tuple[int, int]) -> Params:
        """Return the params that belong to the inner format.

        Args:
            params: of the wrapper.
            shape: (rows, columns).
        """
        own = {part.name for part in self.own_parts(shape)}
        return {name: value for name, value in params.items() if name not in own}


def reduce_to_core(W: Tensor, stats: Statistics, format: Format) -> tuple[Tensor, Statistics]:
    """Return the matrix and statistics that a solver receives of W once all wrappers of `format` have reduced it.

    Args:
        W: fp32 (rows, columns).
        stats: statistics of the layer.
    """
    while isinstance(format, Wrapper):
        reduction = format.reduce(W, stats)
        W, stats, format = reduction.W, reduction.stats, format.inner
    return W, stats
