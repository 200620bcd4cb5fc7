"""ADMM: float weights that meet the loss and the grid half way, until both agree.

    minimize L(T)  subject to  T = G,  G on the grid          G = decode(codes, params)

    1.  T <- some steps of Adam on  L(T) + rho / 2 |T - G + U|^2
    2.  G <- the point of the grid nearest to T + U: codes for these scales, scales for these codes, until stable
    3.  U <- U + T - G

L is the squared distance of the block's outputs from the float block's, each token's as a share of its energy, in
units of the loss of plain rounding. Weights are in units of the root mean square of their row. rho grows every
round, so that T and G meet; their distance is the primal residual |T - G| / |T|. The best G is kept, that of plain
rounding included.

Source: Boyd et al. 2011, section 9.1, for constraints that are not convex; Xu et al. 2021 (arXiv 2112.11438) for
the weights of recurrent language models, whose loss is that of the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import GroupFormat
from bitmill.formats.base import Format
from bitmill.formats.fitting import alternate
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.numerics.grouping import grouped, grouped_importance
from bitmill.solvers import Solver
from bitmill.solvers.nearest import Nearest
from bitmill.tuners.base import TUNERS, BlockTask, Tuner, relative_error
from bitmill.tuners.training import Minibatch, ScaledParameter, adam, adam_step, minibatches

_ALTERNATIONS = 15  # at most, of a projection


@dataclass
class Trace:
    """The course of a block's training.

    start: error of the block with plain rounding.
    errors: of the block with G, after every round.
    residuals: |T - G| / |T| of all weights, after every round.
    """

    start: float
    errors: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)


@TUNERS.register("admm")
@dataclass(frozen=True)
class Admm(Tuner):
    """Alternating directions: loss steps, projection onto the grid, dual update.

    iters: steps a block.  steps: of them in a round.  tokens: in a step.
    rate: of Adam, in units of the root mean square of each row; falls linearly to a tenth.
    rho: weight of the distance to the grid in the first round.  growth: its factor every round.
    """

    iters: int = 100
    steps: int = 5
    rate: float = 5e-2
    rho: float = 1.0
    growth: float = 1.3
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.iters, self.steps, self.tokens) < 1 or not (
            self.rate > 0 and self.rho > 0 and self.growth >= 1
        ):
            raise RecipeError(
                f"admm has iters {self.iters}, steps {self.steps}, tokens {self.tokens}, rate {self.rate}, rho "
                f"{self.rho} and growth {self.growth}; use numbers above 0, and a growth of at least 1."
            )

    def unsupported_reason(self, format: Format) -> str | None:
        """Return a reason for formats that cannot be projected onto row by row, one weight at a time."""
        if isinstance(format, GroupFormat) and format.block == 1 and not format.shared:
            return None
        return f"admm projects onto grids of single weights and the weight format is {format.name!r}."

    def unsupported_solver_reason(self, solver: Solver) -> str | None:
        """Return a reason for solvers other than nearest rounding: the tuner chooses every code itself."""
        if isinstance(solver, Nearest):
            return None
        return f"admm chooses every code itself, and {solver.name} would have none left; use solver nearest."

    def before(self, task: BlockTask) -> None:
        """Train the weights of every linear that is not yet quantized, and quantize them."""
        trace = self.train(task)
        if trace.residuals:
            figures = trace.start, min(trace.start, *trace.errors), trace.residuals[0], trace.residuals[-1]
            message = "admm, block %d: error %.4g to %.4g, primal residual %.3g to %.3g"
            logging.getLogger("bitmill").info(message, task.index, *figures)

    def train(self, task: BlockTask) -> Trace:
        """Do what `before` does, and return its course."""
        splits = {name: _Split(task, name) for name in task.names if name not in task.quantized}
        for name, split in splits.items():
            task.set_quantized(name, split.plain)
        trace = Trace(task.error())
        if not splits or trace.start == 0:
            return trace
        best, kept = trace.start, {name: split.plain for name, split in splits.items()}
        optimizer = adam(([split.weight.steps for split in splits.values()], self.rate))
        batches, rho, done = self._batches(task), self.rho, 0
        while done < self.iters:
            count = min(self.steps, self.iters - done)
            for step in range(done, done + count):
                with torch.enable_grad():
                    loss = _loss(task, next(batches), splits) / trace.start
                    (loss + rho / 2 * sum(split.distance() for split in splits.values())).backward()
                adam_step(optimizer, 1 - 0.9 * step / self.iters)  # T still has to meet G in the end
            done += count
            for name, split in splits.items():
                split.project()
                task.set_quantized(name, split.grid)
            error = task.error()
            trace.errors.append(error)
            trace.residuals.append(_residual(list(splits.values())))
            if error < best:
                best, kept = error, {name: split.grid for name, split in splits.items()}
            for split in splits.values():
                split.dual /= self.growth  # it is scaled by rho
            rho *= self.growth
        for name, quantized in kept.items():
            task.set_quantized(name, quantized)
        return trace

    def _batches(self, task: BlockTask) -> Iterator[Minibatch]:
        """Yield minibatches without end."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from minibatches(task, self.tokens, generator)


class _Split:
    """The float weight T of a linear, its point G on the grid, and the dual variable U.

    plain: G of plain rounding.  grid: the present G.
    """

    def __init__(self, task: BlockTask, name: str) -> None:
        format = task.formats[name]
        assert isinstance(format, GroupFormat)
        W = task.matrix(name).clone()
        self.format, self.shape = format, (W.shape[0], W.shape[1])
        self.weight = ScaledParameter(W)
        self.unit = self.weight.unit.clamp(min=torch.finfo(W.dtype).tiny)
        self.dual = torch.zeros_like(W)
        ones = grouped_importance(None, self.shape, format.group_size, format.block)
        self.importance = ones.to(W.device)
        self.plain = nearest_matrix(format, W, fit_matrix(format, W, None, search=False))
        self.grid = self._nearest(W)
        self.values = self.grid.dequantize()

    def distance(self) -> Tensor:
        """Return the mean square of T - G + U, in units of the rows."""
        return ((self.weight.value() - self.values + self.dual) / self.unit).square().mean()

    @torch.no_grad()
    def project(self) -> None:
        """Move G to the point nearest to T + U, and U by T - G."""
        T = self.weight.value()
        self.grid = self._nearest(T + self.dual)
        self.values = self.grid.dequantize()
        self.dual += T - self.values

    def _nearest(self, V: Tensor) -> Quantized:
        """Return the point of the grid nearest to V, from plain rounding on: the error never rises."""
        x = grouped(V, self.format.group_size, self.format.block)
        start = self.format.fit(x, self.importance, search=False)
        params = alternate(self.format, x, self.importance, start, _ALTERNATIONS)
        return nearest_matrix(self.format, V, params)


def _loss(task: BlockTask, batch: Minibatch, splits: dict[str, _Split]) -> Tensor:
    """Return the error of the block's outputs with the float weights T."""
    tensors = {}
    for name, split in splits.items():
        T = split.weight.value()
        tensors[f"{name}.weight"] = T.T if task.transposed else T
    return relative_error(batch.call.run_with(tensors, task.block, batch.hidden), batch.target).mean()


@torch.no_grad()
def _residual(splits: list[_Split]) -> float:
    """Return |T - G| / |T| of all weights."""
    weights = [split.weight.value() for split in splits]
    distance = sum(float((T - split.values).square().sum()) for T, split in zip(weights, splits))
    return (distance / max(sum(float(T.square().sum()) for T in weights), 1e-30)) ** 0.5
