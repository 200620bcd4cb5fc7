"""The running second moment of a layer's inputs, X^T X / tokens.

Every second-order method reads the same matrix (GPTQ calls 2 X^T X the Hessian of the layer's squared
output error). It is accumulated in fp32 as a running mean, so that its size does not depend on how many
tokens were seen, and only upper blocks are computed: the matrix is symmetric, and products cost as much as
the forward pass itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Widest panel of rows computed at a time. Wide panels make fast products, narrow ones skip more of the
# lower triangle; 384 was the fastest of 96 to 768 on AVX-512 for widths from 576 to 1536.
_PANEL = 384


class RunningGram:
    """Accumulates gram = X^T X / tokens, (width, width) fp32."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(width, width, device=device)
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        """Take in inputs X (tokens, width)."""
        X = X.to(torch.float32)
        width = X.shape[1]
        panel = -(-width // -(-width // _PANEL))  # equal panels of at most _PANEL
        for start in range(0, width, panel):
            stop = min(start + panel, width)
            self.sum[start:stop, start:].addmm_(X[:, start:stop].T, X[:, start:])
        self.tokens += X.shape[0]

    def mean(self) -> Tensor:
        """The full symmetric matrix, divided by the number of tokens."""
        upper = torch.triu(self.sum) / max(self.tokens, 1)
        return upper + torch.triu(upper, 1).T
