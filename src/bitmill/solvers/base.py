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
    """Learns what all layers of a kind share.

    The layers go by one after another, in float and as their solver would be handed them, and are gone when the
    next one comes: a learner keeps what it needs of each, and answers at the end.
    """

    @abstractmethod
    def add_layer(self, W: Tensor, stats: Statistics) -> None:
        """Look at a layer, W fp32 (rows, columns)."""

    @abstractmethod
    def learn(self) -> Params:
        """The shared parts, as stored."""


@dataclass(frozen=True)
class Solver(Member, ABC):
    """Base of all solvers: a frozen dataclass of options."""

    registry: ClassVar[Registry[type[Solver]]] = SOLVERS

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The statistics that calibration must collect, of STATISTICS."""

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """None, or one sentence that says why this format cannot be solved here."""
        return None

    def learner(self, format: GroupFormat, layers: int) -> Learner | None:
        """Who learns what `layers` layers share; None where this solver cannot take stats.shared."""
        return None

    def target(self, W: Tensor, stats: Statistics) -> Tensor:
        """The matrix to come close to, in the metric of stats.gram: W, or what would serve the model better.

        It is moved before wrappers do their part, so that all parts of a sum approach the same matrix.
        """
        return W

    @abstractmethod
    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns), which is the target already."""


def solve(solver: Solver, W: Tensor, stats: Statistics, format: Format) -> Quantized:
    """Quantize W, fp32 (rows, columns): wrappers do their part, the solver sees the innermost format."""
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
    """Quantize matrices that read one input, as one tall matrix where rows are apart: one factorization.

    shared: what each matrix shares with its like in other blocks.
    """
    sizes = [W.shape[0] for W in matrices]
    if format.stackable and len(matrices) > 1:
        return solve(solver, torch.cat(matrices), stats, format).split(sizes)
    known = [replace(own, shared=params) for own, params in zip(stats.split(sizes), shared or [None] * len(sizes))]
    return [solve(solver, W, own, format) for W, own in zip(matrices, known)]


def output_error(W: Tensor, W_hat: Tensor, gram: Tensor | None) -> float:
    """Relative squared error of the layer's output, tr(D G D^T) / tr(W G W^T); of the weights without a Gram."""
    D = W - W_hat
    if gram is None:
        return float(D.square_().sum() / W.square().sum().clamp(min=1e-30))
    return float((D @ gram).mul_(D).sum() / (W @ gram).mul_(W).sum().clamp(min=1e-30))
