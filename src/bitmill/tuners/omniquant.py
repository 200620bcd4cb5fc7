"""OmniQuant: learn the clipping of each group's range and the scale of each channel, block by block.

Problem    the best clipping and the best channel scales depend on each other and on the rest of the block;
           searching them layer by layer ignores both
Equation   high = sigmoid(gamma) max(0, max w), low = sigmoid(beta) min(0, min w), scale = (high - low) / (2^b - 1)
           with a gamma and a beta a group, from 4 (sigmoid .982) on: learnable weight clipping;
           at every seam x / s and W s, log s from 0 on, behind norms with a bias (x - d) / s and b + W d too:
           learnable equivalent transformation
Loss       squared distance of the block's outputs, weights rounded straight through, from the float block's, as a
           share of each token's energy
Stored     ordinary uniform codes: scales are folded into the block, float weights clamped to the learned ranges,
           so that nearest rounding from minimum to maximum reproduces the learned numbers
Source     Shao et al. 2023, "OmniQuant" (arXiv 2308.13137), sections 3.2 and 3.3

The authors' scale between q and k is left out: rotary embeddings allow it for pairs of channels only. Their
start of s is that of SmoothQuant: put that transform, or another, before this tuner. They take thousands of
steps; where there is time for a few dozen, learning gets further from ranges that the `clip` solver finds first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitmill.errors import RecipeError
from bitmill.formats.base import Format
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.scalar import RangeFormat
from bitmill.formats.straight_through import round_in_range
from bitmill.numerics.grouping import grouped, ungrouped
from bitmill.solvers import Solver
from bitmill.solvers.clip import Clip
from bitmill.solvers.nearest import Nearest
from bitmill.transforms.base import expand_channels, fold
from bitmill.tuners.base import TARGETS, TUNERS, BlockTask, Tuner, relative_error
from bitmill.tuners.training import adam, adam_step, minibatches

_WIDE = 4.0  # gamma and beta at the start: sigmoid .982


@TUNERS.register("omniquant")
@dataclass(frozen=True)
class OmniQuant(Tuner):
    """Learn clipping (`lwc`), channel scales (`let`) and, with these, channel shifts (`shift`).

    start: "search" starts from the ranges of least output error of each layer, "wide" from the paper's.
    epochs: passes over the calibration windows, at most.  patience: epochs without gain after which it stops.
    lr_lwc, lr_let: of Adam; fall linearly to 0; ten and two times the paper's.  tokens: in a step.
    """

    epochs: int = 3
    lwc: bool = True
    let: bool = True
    shift: bool = False
    start: Literal["search", "wide"] = "search"
    lr_lwc: float = 1e-1
    lr_let: float = 1e-2
    tokens: int = 1024
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.tokens, self.patience) < 1 or not (self.lr_lwc > 0 and self.lr_let > 0):
            raise RecipeError(
                f"omniquant has epochs {self.epochs}, tokens {self.tokens}, patience {self.patience}, lr_lwc "
                f"{self.lr_lwc} and lr_let {self.lr_let}; use positive numbers."
            )
        if not self.lwc and not self.let:
            raise RecipeError("omniquant has lwc and let false and nothing to learn; set one of them to true.")

    @property
    def needs(self) -> frozenset[str]:
        """The float block's outputs; to start from a search, statistics of the linears' inputs."""
        return TARGETS | ({"activations"} if self.lwc and self.start == "search" else set())

    @property
    def scales_channels(self) -> bool:
        """True with `let`."""
        return self.let

    def unsupported_reason(self, format: Format) -> str | None:
        """Return a reason for formats whose parameters are not a range."""
        if isinstance(format.of_matrix, RangeFormat):
            return None
        return f"omniquant learns ranges of the uniform format, and {format.name} has none."

    def unsupported_solver_reason(self, solver: Solver) -> str | None:
        """Return a reason for solvers other than nearest rounding from minimum to maximum, the learned grid."""
        if isinstance(solver, Nearest) and not solver.search:
            return None
        return "omniquant learns the grid of nearest rounding from minimum to maximum, so it needs solver nearest."

    def before(self, task: BlockTask) -> None:
        """Learn, fold the scales and clamp the weights, unless plain rounding is as good."""
        if task.quantized:
            return  # scales must not be folded into quantized layers
        learned = _Learned(task, self)
        start = best = task.error(learned.plain())
        if start == 0 or not learned.leaves:
            return
        kept: list[Tensor] = []
        optimizer = adam((learned.clips, self.lr_lwc), (learned.scales, self.lr_let))
        generator = torch.Generator().manual_seed(self.seed)
        idle = done = 0
        for epoch in range(self.epochs + 1):
            batches = list(minibatches(task, self.tokens, generator)) if epoch else []
            for batch in batches:
                with torch.enable_grad():
                    output = batch.call.run_with(learned.rounded(), task.block, batch.hidden)
                    (relative_error(output, batch.target).mean() / start).backward()
                adam_step(optimizer, 1 - done / (self.epochs * len(batches)))
                done += 1
            error = task.error(learned.stored())
            idle = 0 if error < best or not epoch else idle + 1
            if error < best:
                best, kept = error, [leaf.detach().clone() for leaf in learned.leaves]
            if idle == self.patience:
                break
        if kept:
            for leaf, value in zip(learned.leaves, kept):
                leaf.data = value
            learned.apply()


class _Learned:
    """The learned parameters of a block, and the block's parameters that follow from them."""

    def __init__(self, task: BlockTask, options: OmniQuant) -> None:
        self.task = task
        self.formats = {name: task.range_format(name) for name in task.names}
        self.parameters = {name: p.detach() for name, p in task.block.named_parameters()}
        # name of a linear -> gamma and beta, (rows, groups) each
        self.ranges = {name: self._start(name, options.start) for name in task.names} if options.lwc else {}
        self.seams = [s for s in task.seams if set(s.targets) & set(task.names)] if options.let else []
        sources = [self.parameters[f"{seam.source}.weight"] for seam in self.seams]
        channels = [W.shape[1 if task.transposed and W.dim() == 2 else 0] for W in sources]
        self.logs = [W.new_zeros(n, requires_grad=True) for W, n in zip(sources, channels)]
        self.shifts = [
            W.new_zeros(n, requires_grad=True)
            if options.shift and W.dim() == 1 and self._has_biases(seam)
            else None
            for seam, W, n in zip(self.seams, sources, channels)
        ]
        self.clips = [leaf for pair in self.ranges.values() for leaf in pair]
        self.scales = [leaf for leaf in (*self.logs, *self.shifts) if leaf is not None]
        self.leaves = self.clips + self.scales

    def _start(self, name: str, start: str) -> tuple[Tensor, Tensor]:
        """Return gamma and beta at the start."""
        W = self.task.matrix(name)
        format, shape = self.formats[name], (W.shape[0], W.shape[1])
        wide = W.new_full(format.grid(shape), _WIDE)
        if start == "wide":
            return wide.clone().requires_grad_(), wide.requires_grad_()
        stats = self.task.input_statistics(name)
        found = Clip().solve(W, stats, format).params
        x = grouped(W, self.formats[name].group_size)
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        span, shorter = found["scale"] * ((1 << format.bits) - 1), torch.minimum(high, -low)
        limit = span / 2  # where magnitudes were cut, if both ends were or one scale serves both
        if not format.symmetric:
            limit = torch.where(limit < shorter, limit, span - shorter)
        gamma, beta = ((limit / end).nan_to_num(1.0).clamp(0.02, 0.995).logit() for end in (high, -low))
        return gamma.requires_grad_(), beta.requires_grad_()

    def _has_biases(self, seam: Any) -> bool:
        return all(f"{name}.bias" in self.parameters for name in (seam.source, *seam.targets))

    def folded(self) -> dict[str, Tensor]:
        """Return the parameters that shifts and scales change, in float."""
        now, changed = dict(self.parameters), set[str]()
        for seam, log, shift in zip(self.seams, self.logs, self.shifts):
            new: dict[str, Tensor] = {}
            if shift is not None:
                new[f"{seam.source}.bias"] = now[f"{seam.source}.bias"] - shift
                for name in seam.targets:
                    new[f"{name}.bias"] = now[f"{name}.bias"] + self._matrix(name, now) @ shift
            new |= fold(log.exp(), seam, now | new, self.task.transposed)
            now, changed = now | new, changed | set(new)
        return {name: now[name] for name in changed}

    def rounded(self) -> dict[str, Tensor]:
        """Return the folded parameters with every linear rounded, straight through."""
        tensors = self.folded()
        for name in self.task.names:
            W = self._matrix(name, tensors)
            low, high = self._range(name, W)
            x = round_in_range(grouped(W, self.formats[name].group_size), low, high, self.formats[name])
            tensors[f"{name}.weight"] = self._place(ungrouped(x, (W.shape[0], W.shape[1])))
        return tensors

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Return the rounded parameters in their stored form."""
        coded = {f"{name}.weight" for name in self.task.names}
        return {n: t if n in coded else self.task.as_stored(n, t) for n, t in self.rounded().items()}

    def plain(self) -> dict[str, Tensor]:
        """Return the linears rounded to nearest from minimum to maximum, without learned parameters."""
        tensors = {}
        for name in self.task.names:
            W = self.task.matrix(name)
            rounded = nearest_matrix(self.formats[name], W, fit_matrix(self.formats[name], W, None, False))
            tensors[f"{name}.weight"] = self._place(rounded.dequantize())
        return tensors

    @torch.no_grad()
    def apply(self) -> None:
        """Fold the learned scales into the block, and clamp its weights to the learned ranges."""
        tensors = self.folded()
        for name in self.task.names:
            W = self._matrix(name, tensors)
            tensors.pop(f"{name}.weight", None)
            low, high = self._range(name, W)
            clamped = grouped(W, self.formats[name].group_size).clamp(low[..., None], high[..., None])
            self.task.originals[name] = W.clone()
            self.task.set_matrix(name, ungrouped(clamped, (W.shape[0], W.shape[1])).contiguous())
        for name, tensor in tensors.items():
            self.task.set_float(name, tensor)
        for seam, log, shift in zip(self.seams, self.logs, self.shifts):
            for name in seam.targets:
                if name in self.task.input_stats:
                    stats = self.task.input_stats.pop(name)
                    if shift is None:  # the moments of shifted inputs were not collected
                        columns = self._matrix(name, self.parameters).shape[1]
                        self.task.input_stats[name] = stats.scale(expand_channels(log.exp(), columns, seam.heads))

    def _matrix(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        """Return the weight of a linear as (out, in)."""
        return self._place(tensors.get(f"{name}.weight", self.parameters[f"{name}.weight"]))

    def _place(self, W: Tensor) -> Tensor:
        """Convert W between (out, in) and the layout of the block."""
        return W.T if self.task.transposed else W

    def _range(self, name: str, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return low and high (rows, groups) of the present W."""
        x = grouped(W, self.formats[name].group_size)
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        if name not in self.ranges:
            return low, high
        gamma, beta = self.ranges[name]
        return low * beta.sigmoid(), high * gamma.sigmoid()
