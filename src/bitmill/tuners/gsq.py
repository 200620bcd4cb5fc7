"""GSQ: codes learned by a relaxed choice among neighbouring levels.

    W^ = sum_k p_k level_k,  p = softmax((logits + noise Gumbel) / temperature)      levels around a weight

The weight is at first between its levels, with the odds of its distance to each; while the temperature falls, the
choice becomes a hard one, whose levels are stored. Scales and zeros learn along. Nothing but codes and parameters
of a plain grid is stored, so that kernels and files are those of rounding to nearest.

Source: the idea of GSQ (IST-DASLab, 2026), whose details are not public: this is bitmill's reading of it. For two
neighbours and no noise it is AdaRound (Nagel et al. 2020, arXiv 2004.10568) with a softmax for its sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bitmill.errors import RecipeError
from bitmill.formats import Format, ScalarFormat
from bitmill.formats.quantized import Quantized
from bitmill.numerics.grouping import grouped, ungrouped
from bitmill.tuners.base import TUNERS, BlockTask, Tuner
from bitmill.tuners.learned_matrix import LearnedMatrix, start_weights
from bitmill.tuners.training import Schedule, adam, learn_codes, rms_rate

_SHARPNESS = 4.0  # logits of a level are minus this times the squared distance in gaps
_COLDEST = 0.1  # share of the first temperature that is left at the end


@TUNERS.register("gsq")
@dataclass(frozen=True)
class GSQ(Tuner):
    """Learn the choice among neighbouring levels of a scalar format, and its parameters.

    epochs: passes over the calibration windows.  tokens: in a step.
    neighbours: levels that a weight chooses among: that of the solver, and those around it.
    rate: of Adam for the logits.  rate_params: for scales and zeros, in units of their root mean square.
    temperature: of the choice at the start; falls to a tenth.  noise: share of Gumbel noise in the choice.
    """

    epochs: int = 2
    neighbours: int = 3
    rate: float = 1e-1
    rate_params: float = 3e-3
    temperature: float = 1.0
    noise: float = 0.0
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = min(self.epochs, self.tokens) >= 1 and min(self.rate, self.rate_params, self.temperature) > 0
        if not positive or self.neighbours < 2 or not 0 <= self.noise <= 1:
            raise RecipeError(
                f"gsq has epochs {self.epochs}, tokens {self.tokens}, neighbours {self.neighbours}, rate "
                f"{self.rate}, rate_params {self.rate_params}, temperature {self.temperature} and noise "
                f"{self.noise}; use numbers above 0, 2 neighbours or more, and noise of at most 1."
            )

    def unsupported_reason(self, format: Format) -> str | None:
        """Return a reason for formats without levels of single weights."""
        if isinstance(format.of_matrix, ScalarFormat):
            return None
        return f"gsq chooses among levels of single weights, and {format.name!r} has none; use a scalar format."

    def after(self, task: BlockTask) -> None:
        """Train, and leave the block in the best state that can be stored."""
        generator = torch.Generator().manual_seed(self.seed)
        matrices = {
            name: RelaxedMatrix(task.originals[name], quantized, self.neighbours, self.noise, generator)
            for name, quantized in task.quantized.items()
        }
        groups: list[tuple[list[Tensor], float]] = [([m.logits for m in matrices.values()], self.rate)]
        for matrix in matrices.values():
            groups += [([p], rms_rate(p, self.rate_params)) for p in matrix.levels.learned_params()]

        def cool(done: float) -> None:
            for matrix in matrices.values():
                matrix.temperature = self.temperature * _COLDEST**done

        learn_codes(task, matrices, adam(*groups), Schedule(self.epochs, self.tokens, self.seed), cool)


class RelaxedMatrix(nn.Module):
    """A matrix whose weights are mixtures of neighbouring levels.

    Args:
        W: fp32 (out, in), the float weights.
        start: the matrix as a solver quantized it, in a scalar format or with quantized inputs around one.
        neighbours: levels that a weight chooses among.
        noise: share of Gumbel noise.
        generator: of the noise.
    """

    def __init__(
        self, W: Tensor, start: Quantized, neighbours: int, noise: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        format = start.format.of_matrix
        assert isinstance(format, ScalarFormat)
        self.format, self.start, self.noise, self.generator = format, start, noise, generator
        self.temperature = 1.0
        self.levels = LearnedMatrix(W.new_zeros(0), start)  # for its parameters alone
        x = grouped(start_weights(W, start), format.group_size)
        table, order = self._table()
        table = table.detach().expand(*x.shape[:2], -1).contiguous()
        count = min(neighbours, table.shape[-1])
        rank = torch.searchsorted(table, x).clamp(max=table.shape[-1] - 1)
        codes = grouped(start.codes, format.group_size)
        chosen = order.argsort(-1).expand(*x.shape[:2], -1).gather(-1, codes.long())
        middle = chosen if count % 2 else rank
        first = (middle - count // 2).clamp(0, table.shape[-1] - count)
        self.register_buffer("ranks", first[..., None] + torch.arange(count, device=x.device))
        values = self._values(table)
        gap = (values[..., -1:] - values[..., :1]) / (count - 1)
        distance = (x[..., None] - values) / gap.clamp(min=1e-30)
        self.logits = nn.Parameter(-_SHARPNESS * distance.square().clamp(max=8.0))

    def _table(self) -> tuple[Tensor, Tensor]:
        """Return the sorted levels with gradients, and the code of each."""
        table, order = self.format.levels(self.levels.params()).sort(-1)
        return table, order

    def _values(self, table: Tensor) -> Tensor:
        """Return the levels to choose among, (rows, groups, width, neighbours)."""
        ranks: Tensor = self.ranks  # type: ignore[assignment]
        flat = table.expand(*ranks.shape[:2], -1).gather(-1, ranks.flatten(2))
        return flat.view(ranks.shape)

    def forward(self) -> Tensor:
        """Return the mixtures (out, in), with gradients."""
        logits: Tensor = self.logits
        if self.noise:
            uniform = torch.rand(logits.shape, generator=self.generator).clamp_(1e-6, 1 - 1e-6).to(logits.device)
            logits = logits - self.noise * (-uniform.log()).log()
        share = torch.softmax(logits / self.temperature, -1)
        return ungrouped((share * self._values(self._table()[0])).sum(-1), self.start.shape)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Return the matrix of the likeliest levels."""
        ranks: Tensor = self.ranks  # type: ignore[assignment]
        rank = ranks.gather(-1, self.logits.argmax(-1, keepdim=True))[..., 0]
        order = self._table()[1].expand(*rank.shape[:2], -1)
        codes = order.gather(-1, rank).to(self.start.codes.dtype)
        flat = ungrouped(codes, self.start.shape).contiguous()
        return replace(self.start, codes=flat, params=self.levels.params())
