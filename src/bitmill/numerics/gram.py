"""The second moment of a layer's inputs, X^T X / tokens, accumulated batch by batch.

Every second-order method uses this matrix (GPTQ calls 2 X^T X the Hessian of the layer's squared output
error). It is summed in fp32 and divided by the number of tokens when it is read. Only upper blocks are
computed: the matrix is symmetric, and these products cost as much as the forward pass itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Widest panel of rows computed at a time. Wide panels make fast products, narrow ones skip more of the
# lower triangle; 384 was the fastest of 96 to 768 on AVX-512 for widths from 576 to 1536.
_PANEL = 384


class RunningGram:
    """Accumulator of gram = X^T X / tokens, (width, width) fp32.

    Attributes:
        max_abs: maximum of |X| in every column, fp32 (width,).
        samples: tokens of X that are kept, evenly from each batch; None without.

    Args:
        width: columns of X.
        device: where sums are kept.
        keeps: tokens that are kept of X, about.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", keeps: int = 0) -> None:
        self._keeps, self._kept = keeps, list[Tensor]()
        self.sum = torch.zeros(width, width, device=device)
        self.max_abs = torch.zeros(width, device=device)
        self.tokens = 0

    def add(self, X: Tensor) -> None:
        """Add inputs X (tokens, width)."""
        X = X.to(torch.float32)
        for start, stop in self._panels():
            self.sum[start:stop, start:].addmm_(X[:, start:stop].T, X[:, start:])
        self.tokens += X.shape[0]
        if len(X):
            self.max_abs = torch.maximum(self.max_abs, X.abs().amax(0))
        if self._keeps and len(X):
            self._kept.append(X[:: max(1, len(X) // self._keeps)].clone())

    @property
    def samples(self) -> Tensor | None:
        """The tokens that were kept, fp32 (about `keeps`, width); None where none were to be kept."""
        if not self._kept:
            return None
        kept = torch.cat(self._kept)
        return kept[:: max(1, len(kept) // self._keeps)]

    def mean(self) -> Tensor:
        """Return the full symmetric matrix, divided by the number of tokens."""
        mean = self.sum / max(self.tokens, 1)
        for start, stop in self._panels():  # in place: whole triangles would take twice the matrix again
            square = mean[start:stop, start:stop]
            square.copy_(torch.triu(square) + torch.triu(square, 1).T)
            mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean

    def _panels(self) -> list[tuple[int, int]]:
        """Divide the width into equal cuts of at most _PANEL."""
        width = self.sum.shape[0]
        panel = -(-width // -(-width // _PANEL))
        return [(start, min(start + panel, width)) for start in range(0, width, panel)]
