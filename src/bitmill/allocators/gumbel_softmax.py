"""A differentiable search over choices by the Gumbel softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.allocators.base import ALLOCATORS, Allocator, Choices, scaled_costs, total_bits


@ALLOCATORS.register("gumbel_softmax")
@dataclass(frozen=True)
class GumbelSoftmax(Allocator):
    """Learn a logit for every choice: expected cost, and a price of the expected size that rises until it fits.

    Every step draws soft choices softmax((logits + Gumbel noise) / temperature), whose temperature falls to 0.1.
    In the end each unit has its largest logit; where the budget is not met, or not used up, units move to the
    neighbouring choice that costs least, or saves most, per bit.

    Paper      One-stage mixed precision by Gumbel softmax (arXiv 2112.11438), over sizes and costs that were
               measured before instead of a network in training

    Attributes:
        steps: of Adam.
        rate: of Adam.
        seed: of the noise.
    """

    steps: int = 200
    rate: float = 0.2
    seed: int = 0

    def _allocate(self, units: Sequence[Choices], budget: int) -> list[int]:
        kept = [unit.pareto() for unit in units]
        learned = self._search(units, kept, budget)
        chosen = [js[int(row[: len(js)].argmax())] for js, row in zip(kept, learned)]
        return _fit(units, kept, chosen, budget)

    @torch.enable_grad()
    def _search(self, units: Sequence[Choices], kept: list[list[int]], budget: int) -> Tensor:
        """Return the logits (units, most choices) in the end; choices that a unit lacks have -Inf."""
        most = max(map(len, kept))
        costs, bits = torch.zeros(len(units), most), torch.zeros(len(units), most)
        absent = torch.ones(len(units), most, dtype=torch.bool)
        for u, (scaled, js) in enumerate(zip(scaled_costs(units), kept)):
            costs[u, : len(js)] = torch.from_numpy(scaled[js])
            bits[u, : len(js)] = torch.tensor([units[u].bits[j] / budget for j in js])
            absent[u, : len(js)] = False
        logits = torch.zeros_like(costs).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=self.rate)
        generator, price = torch.Generator().manual_seed(self.seed), float(costs.max(1).values.sum())
        for step in range(self.steps):
            temperature = 2.0 * 0.05 ** (step / max(self.steps - 1, 1))  # from 2 to 0.1
            noise = -(-torch.rand(costs.shape, generator=generator).clamp_(1e-9, 1 - 1e-7).log()).log()
            soft = ((logits + noise) / temperature).masked_fill(absent, -torch.inf).softmax(1)
            size = (soft * bits).sum()
            loss = (soft * costs).sum() + price * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            price *= 1.05 if float(size.detach()) > 1 else 1 / 1.05
        return logits.detach().masked_fill(absent, -torch.inf)


def _fit(units: Sequence[Choices], kept: list[list[int]], chosen: list[int], budget: int) -> list[int]:
    """Move units to neighbouring choices until the budget is met, and then as long as it has room."""
    chosen = list(chosen)
    while total_bits(units, chosen) > budget:
        down = [(u, js[js.index(chosen[u]) - 1]) for u, js in enumerate(kept) if chosen[u] != js[0]]
        u, j = min(down, key=lambda move: units[move[0]].gain(move[1], chosen[move[0]]))
        chosen[u] = j
    while True:
        left = budget - total_bits(units, chosen)
        up = [
            (u, j)
            for u, js in enumerate(kept)
            for j in js[js.index(chosen[u]) + 1 :]
            if units[u].bits[j] - units[u].bits[chosen[u]] <= left
        ]
        if not up:
            return chosen
        u, j = max(up, key=lambda move: units[move[0]].gain(chosen[move[0]], move[1]))
        chosen[u] = j
