"""Reconstruction of blocks: learned rounding of weights and learned scales of inputs (AdaRound, BRECQ).

    W^ = scale * (floor(W / scale + zero) + h(V) - zero)    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), one V a weight
    minimize  error of the block's outputs + penalty        penalty = mean of 1 - |2 h(V) - 1|^beta, beta 20 to 2

h starts at the place of a weight between its two levels, and the penalty drives it to one of them. Scales of
weights, and those of inputs that come from calibration, learn along; gradients pass the rounding of inputs as in
LSQ. Inputs are those that the quantized blocks before produce.

The error is that of every token relative to its energy or, with `fisher`, the loss that an error e of the outputs
causes to second order, e F e / 2. F is known by one gradient g for each window and draw; the mean of (g e)^2 is
unbiased, but of few draws it sees few directions, so that the diagonal of F, averaged over windows, is added to
it with equal weight (the diagonal plus low rank of FIMA-Q).

Sources: Nagel et al. 2020 (arXiv 2004.10568), section 3; Li et al. 2021, BRECQ (arXiv 2102.05426); Wu et al. 2025,
FIMA-Q (arXiv 2506.11543). The papers take 20,000 steps of a block on 1,024 pictures with a rate of 1e-3; fewer
steps need the larger rates here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bitmill.architectures.inputs import hook_inputs
from bitmill.errors import RecipeError
from bitmill.formats.base import Format, Params
from bitmill.formats.quantized import Quantized
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.scalar import RangeFormat
from bitmill.numerics.grouping import grouped, ungrouped
from bitmill.tuners.base import OUTPUT_GRADIENTS, TARGETS, TUNERS, BlockTask, Tuner
from bitmill.tuners.learned_matrix import start_weights, stored_form
from bitmill.tuners.training import BlockLoss, Minibatch, Schedule, adam, learn_codes, plain_loss, rms_rate

_STRETCH = 0.1  # of h beyond 0 and 1
_WARM = 0.2  # share of the steps without penalty
_BETA = (20.0, 2.0)


@TUNERS.register("reconstruct")
@dataclass(frozen=True)
class Reconstruct(Tuner):
    """Learn the rounding of a block's weights and the scales of its inputs.

    iters: steps a block.  minutes: of a clock for all blocks, after which training ends early; 0 for no limit.
    fisher: weigh errors by gradients of the model's loss.  draws: such gradients for each window.
    rate: of Adam for V.  rate_params: for scales, in units of their root mean square; 0 leaves them.
    penalty: weight of the penalty, in units of the error at the start.  tokens: in a step.
    """

    iters: int = 500
    minutes: float = 0.0
    fisher: bool = False
    draws: int = 1
    rate: float = 2e-2
    rate_params: float = 1e-3
    penalty: float = 0.3
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = min(self.iters, self.tokens, self.draws) >= 1 and self.rate > 0
        if not positive or min(self.minutes, self.rate_params, self.penalty) < 0:
            raise RecipeError(
                f"reconstruct has iters {self.iters}, tokens {self.tokens}, draws {self.draws}, rate {self.rate}, "
                f"minutes {self.minutes}, rate_params {self.rate_params} and penalty {self.penalty}; use numbers "
                "above 0, or 0 for no minutes, fixed scales and no penalty."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Outputs of the float model, and gradients of its loss by them."""
        return TARGETS | OUTPUT_GRADIENTS if self.fisher else TARGETS

    def unsupported_reason(self, format: Format) -> str | None:
        """Return a reason for formats without evenly spaced levels."""
        if isinstance(format.of_matrix, RangeFormat):
            return None
        return f"reconstruct learns the rounding of uniform grids and the weight format is {format.name!r}."

    def after(self, task: BlockTask) -> None:
        """Train, and leave the block in the best state that can be stored."""
        matrices = {
            name: LearnedRounding(task.originals[name], quantized) for name, quantized in task.quantized.items()
        }
        groups: list[tuple[list[Tensor], float]] = [([m.V for m in matrices.values()], self.rate)]
        if self.rate_params:
            scales = [matrix.scale for matrix in matrices.values()]
            for leaf in [*scales, *_share_inputs(task, matrices)]:
                leaf.requires_grad_()
                groups += [([leaf], rms_rate(leaf, self.rate_params))]
        done = 0.0

        def before_step(share: float) -> None:
            nonlocal done
            done = share
            _hook_learned_inputs(task, matrices)

        def penalty() -> Tensor:
            shares = torch.stack([matrix.softness(_beta(done)) for matrix in matrices.values()])
            return shares.mean() * (self.penalty if done >= _WARM else 0.0)

        seconds = 60 * self.minutes / task.depth if self.minutes else math.inf
        schedule = Schedule(tokens=self.tokens, seed=self.seed, steps=self.iters, seconds=seconds)
        loss: BlockLoss = FisherLoss(task.output_gradients) if self.fisher else plain_loss
        learn_codes(task, matrices, adam(*groups), schedule, before_step, loss, penalty if self.penalty else None)


def _beta(done: float) -> float:
    """Return the exponent of the penalty, which falls along a cosine once the penalty has begun."""
    share = max(0.0, done - _WARM) / (1 - _WARM)
    return _BETA[1] + 0.5 * (_BETA[0] - _BETA[1]) * (1 + math.cos(math.pi * share))


class FisherLoss:
    """The loss that errors of a block's outputs cause, to second order.

    Args:
        gradients: (draws, windows, tokens, width), batch by batch.
    """

    def __init__(self, gradients: Iterable[Tensor]) -> None:
        squares = [part.square().mean(0) for part in gradients]
        self._diagonal = torch.cat(squares).mean(0)

    def __call__(self, batch: Minibatch, output: Tensor) -> Tensor:
        """Return the loss of each window, (windows,)."""
        assert batch.gradients is not None
        error = output - batch.target
        low_rank = (batch.gradients * error).sum((-1, -2)).square().mean(0)
        return (low_rank + (self._diagonal * error.square()).sum((-1, -2))) / 2


class LearnedRounding:
    """A matrix of evenly spaced levels while its weights choose between the two levels around them.

    Args:
        W: fp32 (out, in), the float weights.
        start: the matrix as a solver quantized it; weights that it moved further start from there.
    """

    def __init__(self, W: Tensor, start: Quantized) -> None:
        format = start.format.of_matrix
        assert isinstance(format, RangeFormat)
        self.start, self._format = start, format
        self._parts = {part.name: part for part in start.format.parts(start.shape)}
        self.scale = start.params["scale"].detach().clone()
        zero = start.params.get("zero")
        self._zero = torch.full_like(self.scale, 1 << (format.bits - 1)) if zero is None else zero
        x = grouped(start_weights(W, start), format.group_size)
        place = x / self.scale[..., None] + self._zero[..., None]
        self._low = place.floor().clamp(0, max(0, (1 << format.bits) - 2))
        share = (place - self._low).clamp(0, 1)
        self.V = torch.logit((share + _STRETCH) / (1 + 2 * _STRETCH)).requires_grad_()
        self.inputs: dict[str, Tensor] = {}  # learned parameters of inputs, shared with layers that read them too

    def _share(self) -> Tensor:
        return (torch.sigmoid(self.V) * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)

    def _stored_scale(self) -> Tensor:
        return stored_form(self._parts["scale"], self.scale, positive=True)

    def __call__(self) -> Tensor:
        """Return the matrix (out, in) between its levels, with gradients."""
        steps = self._low + self._share() - self._zero[..., None]
        return ungrouped(steps * self._stored_scale()[..., None], self.start.shape)

    def softness(self, beta: float) -> Tensor:
        """Return the mean of 1 - |2 h - 1|^beta, 0 where every weight is on a level."""
        return 1 - (2 * self._share() - 1).abs().pow(beta).mean()

    def input_params(self) -> Params:
        """Return the parameters of the inputs as stored, with gradients."""
        return {
            name: stored_form(self._parts[name], leaf, name in _POSITIVE) for name, leaf in self.inputs.items()
        }

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Return the matrix of the closer levels."""
        codes = (self._low + (self.V >= 0)).to(self.start.codes.dtype)
        flat = codes.reshape(self.start.shape[0], -1)[:, : self.start.shape[1]].contiguous()
        params = {**self.start.params, "scale": self._stored_scale(), **self.input_params()}
        return replace(self.start, codes=flat, params=params)


_POSITIVE = frozenset({"input_scale"})


def _share_inputs(task: BlockTask, matrices: dict[str, LearnedRounding]) -> list[Tensor]:
    """Let matrices hold the parameters of their inputs that are learned; return the leaves.

    Layers that read one input with equal parameters share them, as kernels that compute them together expect.
    """
    leaves: list[Tensor] = []
    for stage in task.stages:
        known: list[dict[str, Tensor]] = []
        for name in (name for name in stage if name in matrices):
            matrix, format = matrices[name], task.formats[name]
            if not isinstance(format, QuantizedInputs) or not format.learned_inputs:
                continue
            start = {part: matrix.start.params[part] for part in sorted(format.learned_inputs)}
            shared = next((leaf for leaf in known if _equal(leaf, start)), None)
            if shared is None:
                shared = {part: value.detach().clone() for part, value in start.items()}
                known.append(shared)
                leaves += shared.values()
            matrix.inputs = shared
    return leaves


def _hook_learned_inputs(task: BlockTask, matrices: dict[str, LearnedRounding]) -> None:
    """Round inputs by the present parameters; a measurement of the block leaves the stored ones."""
    for name, matrix in matrices.items():
        format = task.formats[name]
        if matrix.inputs and isinstance(format, QuantizedInputs):
            rounding = partial(_rounded_inputs, format, matrix)
            hook_inputs(task.block.get_submodule(name), rounding, differentiable=True)


def _rounded_inputs(format: QuantizedInputs, matrix: LearnedRounding, x: Tensor) -> Tensor:
    return format.fake_quantize_inputs(x, {**matrix.start.params, **matrix.input_params()})


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
