"""Permuted: another format for the matrix with its columns in another order.

    order  the column stored at each place, ceil(log2(columns)) bits each

Formats that code blocks of columns spend equal bits on every block, and codebooks that all blocks share can
give the places in a block unequal shares of them. So columns are dealt to blocks by importance: sorted by the cost
of an error there, the first place of every block has one of the most important columns, the last place one of the
least. Formats that code single columns get them sorted, and groups hold columns of one kind.

    cost of column j   (mean over rows of w_ij^2 / mean w_i^2) / (H^-1)_jj,  H the damped Gram of the inputs

At run time the inputs are gathered in this order. Bits a weight: the inner format's and about
log2(columns)/rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitmill.formats.base import FORMATS, Params
from bitmill.formats.part import Part
from bitmill.formats.quantized import Quantized
from bitmill.formats.wrapper import Reduction, Wrapper
from bitmill.numerics.cholesky import inverse_factor
from bitmill.numerics.statistics import Statistics

_DAMP = 0.05


@FORMATS.register("permuted")
@dataclass(frozen=True)
class Permuted(Wrapper):
    """The inner format for columns dealt to its blocks by importance."""

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrix of the inputs."""
        return self.inner.needs | frozenset({"gram"})

    def own_parts(self, shape: tuple[int, int]) -> tuple[Part, ...]:
        """Return the order, a permutation of the columns."""
        bits = max(1, (shape[1] - 1).bit_length())
        if bits > 16:
            return (Part("order", (shape[1],), stored_as=torch.int32),)
        return (Part("order", (shape[1],), bits),)

    def damage_reason(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> str | None:
        """Return the inner format's, or that the order is no permutation."""
        order = self.own_parts(shape)[0].unpack(tensors["order"]).long()
        if not torch.equal(order.sort().values, torch.arange(shape[1], device=order.device)):
            return "its order is no permutation of the columns"
        return super().damage_reason(tensors, shape)

    def effective_inputs(self, x: Tensor, params: Params) -> Tensor:
        """Return the inputs that are rounded in the order in which columns are stored, in their own order."""
        if not self.quantizes_inputs:
            return x
        order = params["order"].long()
        return self.inner.effective_inputs(x[..., order], params)[..., order.argsort()]

    def reduce(self, W: Tensor, stats: Statistics) -> Reduction:
        """Permute the columns of the matrix; the inner format stores the result.

        Raises:
            NumericsError: when there is no Gram matrix.
        """
        order = deal_columns(_cost(W, stats.required_gram(self.name)), self.core.block)

        def finish(solved: Quantized) -> Quantized:
            part = self.own_parts(solved.shape)[0]
            own = {"order": order.to(torch.float32 if part.bits else torch.int32)}
            return replace(solved, format=self, params={**solved.params, **own})

        return Reduction(W[:, order], stats.permute(order), finish)

    def inner_matrix(self, W: Tensor, params: Params) -> Tensor:
        """Return the columns in the order in which they are stored."""
        return W[:, params["order"].long()]

    def assemble(self, inner: Tensor, params: Params, shape: tuple[int, int]) -> Tensor:
        """Restore the order of the columns."""
        return inner[:, params["order"].long().argsort()]


def deal_columns(cost: Tensor, block: int) -> Tensor:
    """Return the columns in the order in which they are stored: descending cost is dealt to the blocks in turn.

    Place p of block i gets the column of rank p * blocks + i; the columns of a ragged block come last.

    Args:
        cost: (columns,).
        block: columns coded jointly.

    Returns:
        int64 (columns,).
    """
    ranked = torch.argsort(cost, descending=True, stable=True)
    whole = len(ranked) // block * block
    return torch.cat([ranked[:whole].reshape(block, -1).T.reshape(-1), ranked[whole:]])


def _cost(W: Tensor, gram: Tensor) -> Tensor:
    """Return the cost of proportional errors in each column, (columns,), once other columns compensate."""
    power = W.square().mean(1, keepdim=True)
    size = (W.square() / power.clamp(min=1e-30)).mean(0)
    if not bool(gram.diagonal().any()):
        return size
    U, _ = inverse_factor(gram, _DAMP)
    return size / U.square().sum(0)
