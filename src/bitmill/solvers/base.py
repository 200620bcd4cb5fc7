"""The contract of a solver: a pure function from a matrix, statistics and a format to a `Quantized`.

Laws (tests/conformance/test_solvers.py): on seeded cases a solver's own objective is no worse than nearest
rounding's; the result is deterministic; every scalar format is accepted or refused with a reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bitmill.config.registry import Member, Registry
from bitmill.formats import Format, GroupFormat, Params, Wrapper
from bitmill.formats.quantized import Quantized
from bitmill.numerics.statistics import Statistics

SOLVERS: Registry[type[Solver]] = Registry("solver", "bitmill.solvers")


class Learner(ABC):
    """Learns the parts that all layers of a kind share.

    The layers are passed one after another, in float and as their solver would receive them, and are freed before
    the next one: a learner keeps the samples that it needs of each.
    """

    @abstractmethod
    def add_layer(self, W: Tensor, stats: Statistics) -> None:
        """Take samples of a layer.

        Args:
            W: fp32 (rows, columns), as returned by `formats.wrapper.reduce_to_core`.
            stats: its statistics.
        """

    @abstractmethod
    def learn(self) -> Params:
        """Return the shared parts, as stored."""


@dataclass(frozen=True)
class Solver(Member, ABC):
    """Base of all solvers: a frozen dataclass of options."""

    registry: ClassVar[Registry[type[Solver]]] = SOLVERS

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The statistics that calibration must collect, of STATISTICS."""

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """Return one sentence on why this format cannot be solved here; None where it can."""
        return None

    def learner(self, format: GroupFormat, layers: int) -> Learner | None:
        """Return the learner of shared parts; None where this solver cannot use stats.shared.

        Args:
            format: the core format.
            layers: number of layers that share the parts.
        """
        return None

    def target(self, W: Tensor, stats: Statistics) -> Tensor:
        """Return the matrix to approximate in the metric of stats.gram: W, or one that serves the model better.

        It is computed before wrappers reduce the problem, so that all parts of a sum approach one matrix.

        Args:
            W: fp32 (rows, columns).
            stats: of the layer.
        """
        return W

    @abstractmethod
    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize a matrix.

        Args:
            W: fp32 (rows, columns), the target already.
            stats: of the layer.
            format: the core format.
        """


def solve(solver: Solver, W: Tensor, stats: Statistics, format: Format) -> Quantized:
    """Quantize a matrix: wrappers reduce the problem, the solver works on the innermost format.

    Args:
        W: fp32 (rows, columns).
        stats: of the layer.
        format: any format.

    Raises:
        NumericsError: when statistics that the solver or format needs are missing or cannot be factorized.
    """
    return _solve(solver, solver.target(W, stats), stats, format)


def _solve(solver: Solver, W: Tensor, stats: Statistics, format: Format) -> Quantized:
    if isinstance(format, Wrapper):
        reduction = format.reduce(W, stats)
        return reduction.finish(_solve(solver, reduction.W, reduction.stats, format.inner))
    assert isinstance(format, GroupFormat)
    return solver.solve(W, stats, format)


def solve_stacked(
    solver: Solver,
    matrices: list[Tensor],
    stats: Statistics,
    format: Format,
    shared: Sequence[Params | None] | None = None,
) -> list[Quantized]:
    """Quantize matrices that read one input, as one tall matrix (one factorization) where the format allows it.

    Args:
        matrices: fp32 (rows, columns) each.
        stats: of the stacked matrices.
        format: any format.
        shared: parts that each matrix shares with the layers of its kind in other blocks.

    Returns:
        The quantized matrices in order.
    """
    sizes = [W.shape[0] for W in matrices]
    if format.stackable and len(matrices) > 1:
        return solve(solver, torch.cat(matrices), stats, format).split(sizes)
    parts = shared or [None] * len(sizes)
    own = [replace(each, shared=params) for each, params in zip(stats.split(sizes), parts)]
    return [solve(solver, W, each, format) for W, each in zip(matrices, own)]


def output_error(W: Tensor, W_hat: Tensor, gram: Tensor | None) -> float:
    """Return the relative squared error of the layer's output, tr(D G D^T) / tr(W G W^T), D = W - W_hat.

    Args:
        W, W_hat: fp32 (rows, columns).
        gram: G (columns, columns); None for the error of the weights.
    """
    if gram is None:
        error, total = squared_norm(W - W_hat), squared_norm(W)
        return error / total if total else error
    largest = W.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0)  # squares of small numbers are 0 in fp32, of large ones Inf
    D, V = (W - W_hat).div_(unit), W / unit
    return float((D @ gram).mul_(D).sum() / (V @ gram).mul_(V).sum().clamp(min=1e-30))


def squared_norm(W: Tensor) -> float:
    """Return the sum of squares in fp64, which holds the squares of all fp32 numbers."""
    return float(torch.linalg.vector_norm(W, dtype=torch.float64)) ** 2
