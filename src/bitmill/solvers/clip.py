"""Nearest rounding on clipped ranges: per row and group, the range of least output error.

For share = 1, .95, .9, ... the largest |weight| of the group is clamped to that share, the format's closed-form
parameters are fitted to the clamped weights, and the group's own part of the output error, d^T G_gg d with
d = w - w^, decides. That choice ignores interactions of errors of different groups; rows for which it would
cost more than it gains keep their full ranges, so that the result is never worse than nearest rounding.

Source: AWQ's code (mit-han-lab/llm-awq, auto_clip.py), which samples the group's partial outputs on 512 tokens
where the Gram block is exact over all, and leaves q and k alone; clipping them too was better in all measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats import GroupFormat, Params
from bitmill.formats.quantized import Quantized, nearest_matrix
from bitmill.numerics.grouping import grouped, grouped_importance
from bitmill.numerics.statistics import GRAM, Statistics
from bitmill.solvers.base import SOLVERS, Solver

_SLICE = 1 << 22  # weights processed together


@SOLVERS.register("clip")
@dataclass(frozen=True)
class Clip(Solver):
    """`steps` shares of the full range, from 1 down to a little above `lowest`."""

    steps: int = 10
    lowest: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 <= self.lowest < 1:
            raise RecipeError(
                f"steps is {self.steps!r} and lowest {self.lowest!r}; use 1 or more and 0 to below 1."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrix of the layer's inputs."""
        return GRAM

    def unsupported_reason(self, format: GroupFormat) -> str | None:
        """Return why groups cannot choose their ranges one by one: some share a number."""
        if any(part.span > 1 for part in format.parts((1, 1))):
            return (
                f"clip chooses a range for each group alone, and groups of {format.name} share a scale; use gptq."
            )
        return None

    def solve(self, W: Tensor, stats: Statistics, format: GroupFormat) -> Quantized:
        """Quantize W, fp32 (rows, columns), in the metric of stats.gram.

        Raises:
            NumericsError: when there is no Gram matrix.
        """
        gram = stats.required_gram(self.name)
        step = max(1, _SLICE // W.shape[1]) if format.stackable else W.shape[0]
        pieces = [self._solve(piece, gram, format) for piece in W.split(step)]
        params = {name: torch.cat([p.params[name] for p in pieces]) for name in pieces[0].params}
        return Quantized(format, torch.cat([p.codes for p in pieces]), params, (W.shape[0], W.shape[1]))

    def _solve(self, W: Tensor, gram: Tensor, format: GroupFormat) -> Quantized:
        """Quantize some rows, or all of them where they share parameters."""
        size, block = format.group_size, format.block
        x = grouped(W, size, block)
        importance = grouped_importance(gram.diagonal(), (W.shape[0], W.shape[1]), size, block)
        blocks = _diagonal_blocks(gram, x.shape[2] // (W.shape[0] // x.shape[0]))
        peak = x.abs().amax(-1, keepdim=True)
        full = best = format.fit(x, importance, search=False)
        least = _sum_shared(_error(x, best, blocks, format), best)
        for step in range(1, self.steps):
            limit = peak * (1 - step * (1 - self.lowest) / self.steps)
            trial = format.fit(x.clamp(-limit, limit), importance, search=False)
            error = _sum_shared(_error(x, trial, blocks, format), trial)
            best = _where(error < least, trial, best)
            least = torch.minimum(error, least)
        worse = _row_error(W, best, gram, format) > _row_error(W, full, gram, format)
        return nearest_matrix(format, W, _where(worse, full, best))


def _diagonal_blocks(gram: Tensor, width: int) -> Tensor:
    """Return G_gg of every group of `width` columns, (groups, width, width), 0 where the last one is ragged."""
    groups = -(-gram.shape[0] // width)
    missing = groups * width - gram.shape[0]
    gram = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    return torch.stack([gram[k : k + width, k : k + width] for k in range(0, groups * width, width)])


def _error(x: Tensor, params: Params, blocks: Tensor, format: GroupFormat) -> Tensor:
    """Return d^T G_gg d, (rows, groups)."""
    D = x - format.decode(format.nearest(x, params), params)
    D = D.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
    return (D @ blocks).mul_(D).sum(-1).T


def _row_error(W: Tensor, params: Params, gram: Tensor, format: GroupFormat) -> Tensor:
    """Return the whole output error of every row, groups together, (rows|1, 1)."""
    D = W - nearest_matrix(format, W, params).dequantize()
    return _sum_shared((D @ gram).mul_(D).sum(1, keepdim=True), params)


def _sum_shared(error: Tensor, params: Params) -> Tensor:
    """Sum errors (rows, groups) over the rows or groups that share one of the parameters."""
    for axis in (0, 1):
        if any(value.shape[axis] == 1 for value in params.values()):
            error = error.sum(axis, keepdim=True)
    return error


def _where(better: Tensor, new: Params, old: Params) -> Params:
    """Choose parameters by row and group; better: (rows|1, groups|1)."""
    return {name: torch.where(better[(..., *[None] * (v.dim() - 2))], new[name], v) for name, v in old.items()}
