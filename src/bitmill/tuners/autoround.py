"""AutoRound: rounding learned from the signs of gradients.

    W^ = scale * (clip(round(W / scale + V) + zero) - zero)      V in [-1/2, 1/2], one a weight, starting at 0
    low = beta min(W), high = alpha max(W)                       alpha, beta in (0, 1], one a group
    V -= rate * sign(dL/dV),   alpha and beta alike              L: squared distance of the block's outputs,
                                                             each token's as a share of its energy

All linears of a block learn together, on inputs as the quantized blocks before produce them, against what the
float model has after the block. The rate falls linearly to 0. The gradient with respect to W^ is all that
autograd computes: rounding passes it on (straight through), so the rest is elementwise.

Source: Cheng et al. 2023 (arXiv 2309.05516), section 3 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import Format, Params
from bitmill.formats.quantized import Quantized
from bitmill.formats.scalar import RangeFormat
from bitmill.numerics.grouping import grouped, ungrouped
from bitmill.solvers import Solver
from bitmill.solvers.nearest import Nearest
from bitmill.tuners.base import TUNERS, BlockTask, Tuner, relative_error
from bitmill.tuners.training import minibatches

_NARROWEST = 0.05  # of a group's range


@TUNERS.register("autoround")
@dataclass(frozen=True)
class AutoRound(Tuner):
    """Learned rounding and ranges for uniform grids.

    iters: steps a block.  rate: of the first step, 0 for 1 / iters.  tokens: in a step.
    search: start from the shrunken ranges of least weight error instead of the full ones.
    """

    iters: int = 100
    rate: float = 0.0
    tokens: int = 512
    search: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.iters, self.tokens) < 1 or not 0 <= self.rate <= 1:
            raise RecipeError(
                f"autoround has iters {self.iters}, tokens {self.tokens} and rate {self.rate}; use positive "
                "numbers, and a rate of at most 1."
            )

    def unsupported_reason(self, format: Format) -> str | None:
        """Return a reason for formats without a range: a neighbouring level must be one step away."""
        if isinstance(format, RangeFormat):
            return None
        return f"autoround learns the rounding of uniform grids and the weight format is {format.name!r}."

    def unsupported_solver_reason(self, solver: Solver) -> str | None:
        """Return a reason for solvers other than nearest rounding: the tuner rounds every linear itself."""
        if isinstance(solver, Nearest):
            return None
        return f"autoround rounds every linear itself, and {solver.name} would have none left; use solver nearest."

    def before(self, task: BlockTask) -> None:
        """Learn the rounding of every linear that is not yet quantized, and quantize it.

        Nearest rounding is kept where learning did not lower the block's error.
        """
        roundings = {
            name: _Rounding(task.range_format(name), task.matrix(name), self.search)
            for name in task.names
            if name not in task.quantized
        }
        for name, rounding in roundings.items():
            task.set_quantized(name, rounding.quantized())
        start = task.error()
        nearest = {name: task.quantized[name] for name in roundings}
        self._learn(task, roundings)
        for name, rounding in roundings.items():
            task.set_quantized(name, rounding.quantized())
        if not task.error() <= start:
            for name, quantized in nearest.items():
                task.set_quantized(name, quantized)

    def _learn(self, task: BlockTask, roundings: dict[str, _Rounding]) -> None:
        """Run all steps; the last ones are so small that the last state serves as the best."""
        rate = self.rate or 1 / self.iters
        generator = torch.Generator().manual_seed(self.seed)
        done = 0
        while done < self.iters:
            for batch in islice(minibatches(task, self.tokens, generator), self.iters - done):
                matrices = {name: rounding.matrix().requires_grad_() for name, rounding in roundings.items()}
                with torch.enable_grad():
                    tensors = {f"{n}.weight": W.T if task.transposed else W for n, W in matrices.items()}
                    output = batch.call.run_with(tensors, task.block, batch.hidden)
                    relative_error(output, batch.target).sum().backward()
                for name, rounding in roundings.items():
                    gradient = matrices[name].grad
                    if gradient is not None:  # None of an expert that no token was sent to
                        rounding.step(gradient, rate * (1 - done / self.iters))
                done += 1


class _Rounding:
    """One matrix while its rounding is learned; all tensors in groups (rows, groups, width)."""

    def __init__(self, format: RangeFormat, W: Tensor, search: bool) -> None:
        self.format, self.shape = format, (W.shape[0], W.shape[1])
        self.top = (1 << format.bits) - 1
        self.W = grouped(W, format.group_size)
        self.V = torch.zeros_like(self.W)
        self.low, self.high = self.W.amin(-1).clamp(max=0), self.W.amax(-1).clamp(min=0)
        if format.symmetric:
            self.high = torch.maximum(self.high, -self.low)
            self.low = -self.high
        self.alpha, self.beta = torch.ones_like(self.high), torch.ones_like(self.low)
        if search:
            found = format.fit(self.W, torch.ones_like(self.W[:1]))["scale"]
            share = found * self.top / (self.high - self.low).clamp(min=1e-30)
            self.alpha = share.clamp(_NARROWEST, 1)
            self.beta = self.alpha.clone()

    def params(self) -> Params:
        """Return scale and zero of the present ranges, as stored."""
        return self.format.from_range(self.low * self.beta, self.high * self.alpha)

    def codes(self, params: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Return rounded codes before and after clipping, and their zero."""
        scale = params["scale"][..., None]
        zero = params["zero"][..., None] if "zero" in params else torch.full_like(scale, (self.top + 1) // 2)
        free = torch.addcdiv(self.V, self.W, scale).add_(zero).round_()
        return free, free.clamp(0, self.top), zero

    def matrix(self) -> Tensor:
        """Return W^ (rows, columns) in its present stored form."""
        params = self.params()
        _, codes, zero = self.codes(params)
        return ungrouped(codes.sub_(zero).mul_(params["scale"][..., None]), self.shape)

    def quantized(self) -> Quantized:
        """Return the quantized matrix."""
        params = self.params()
        codes = self.codes(params)[1].to(torch.uint8).reshape(self.shape[0], -1)[:, : self.shape[1]]
        return Quantized(self.format, codes.contiguous(), params, self.shape)

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move against the signs of the gradient.

        Args:
            gradient: of W^, (rows, columns).
            rate: of this step.
        """
        G, params = grouped(gradient, self.format.group_size), self.params()
        free, codes, zero = self.codes(params)
        outside = free != codes
        scale = params["scale"]
        through = codes.sub_(zero).sub_((self.W / scale[..., None]).masked_fill_(outside, 0))  # d W^ / d scale
        by_scale = (G * through).sum(-1)
        if self.format.symmetric:
            by_high, by_low = by_scale, -by_scale
        else:
            by_zero = -scale * (G * outside).sum(-1)
            by_scale += by_zero * self.low * self.beta / scale.square()
            by_high, by_low = by_scale, -by_scale - by_zero * self.top / scale
        self.V.add_(G.masked_fill(outside, 0).sign_(), alpha=-rate).clamp_(-0.5, 0.5)
        self.alpha.sub_((by_high * self.high).sign_(), alpha=rate).clamp_(_NARROWEST, 1)
        if self.format.symmetric:
            self.beta = self.alpha
        else:
            self.beta.sub_((by_low * self.low).sign_(), alpha=rate).clamp_(_NARROWEST, 1)
