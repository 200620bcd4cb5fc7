"""Deferred logits as one tensor."""

from __future__ import annotations

import torch

from bitmill.evaluation.logits import Output, pieces


def read(output: Output, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (windows, length, vocabulary) of tokens (windows, length)."""
    windows, length = tokens.shape
    return torch.stack([torch.cat(list(pieces(output, window, length))) for window in range(windows)])
