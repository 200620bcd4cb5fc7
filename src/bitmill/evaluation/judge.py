"""Who judges a model: perplexity for what predicts tokens, embeddings for an encoder."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from bitmill.evaluation.embedding import Embeddings
from bitmill.evaluation.metrics import Comparison


class Metric(Protocol):
    """Takes in what a model, and its reference, answer to windows of tokens, and says what it is worth."""

    def add(self, tokens: Tensor, answer: Tensor, reference: Tensor | None = None) -> None:
        """Tokens (windows, length), and what one or two models say of them (windows, length, n)."""
        ...

    def result(self) -> dict[str, Any]:
        """The measures as plain data."""
        ...


def metric_for(pooling: str | None) -> Metric:
    """The judge of an encoder whose embeddings are pooled that way, or, without any, of a decoder."""
    return Comparison() if pooling is None else Embeddings(pooling)
