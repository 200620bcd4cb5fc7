"""The weighted average over the tokens so far, with one learned score for each token.

a_t = w . x_t        y_t = sum_{s <= t} exp(a_s) x_s / sum_{s <= t} exp(a_s)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# of earlier tokens: log of the sum of weights (batch,), and average (batch, width)
State = tuple[Tensor, Tensor]


class AttentionAverage(nn.Module):
    """A running average, as in textgenrnn's AttentionWeightedAverage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Average over tokens.

        Args:
            hidden: (batch, tokens, width).
            state: of earlier tokens; None for the start of a text.

        Returns:
            Averages (batch, tokens, width), and the state after the last token.
        """
        scores = hidden.float() @ self.weight.float()
        values = hidden
        if state is not None:  # earlier tokens are one more token, in front
            scores = torch.cat([state[0][:, None], scores], 1)
            values = torch.cat([state[1][:, None].to(hidden.dtype), hidden], 1)
        later = torch.ones(hidden.shape[1], scores.shape[1], dtype=torch.bool, device=hidden.device)
        seen = later.tril(scores.shape[1] - hidden.shape[1])
        shares = scores[:, None].masked_fill(~seen, -torch.inf)
        averages = shares.softmax(-1).to(values.dtype) @ values
        return averages, (scores.logsumexp(1), averages[:, -1])
