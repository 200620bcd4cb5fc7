"""What an encoder is worth: whether its sentence embeddings stay where the float model has them.

cosine_similarity      mean cosine of a sentence's embedding and the reference's of the same sentence
neighbour_agreement    share of sentences whose nearest other sentence, by cosine, is the same in both models
pair_cosine            mean cosine of two different sentences: what it is to have nothing to do with each other

An encoder predicts no token, so there is no perplexity. A cosine is to be read against `pair_cosine`: where all
embeddings point the same way, being close to the reference means little.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bitmill.errors import CalibrationError, NumericsError, UsageError

_ROWS = 1024  # sentences whose similarities to all others are held at a time

DEFAULT_POOLING = "mean"
POOLINGS = {
    "mean": lambda hidden: hidden.mean(1),
    "cls": lambda hidden: hidden[:, 0],
    "max": lambda hidden: hidden.amax(1),
}


def embed(hidden: Tensor, pooling: str) -> Tensor:
    """Embeddings of length one (windows, width) from hidden states (windows, tokens, width) without padding."""
    return normalize(POOLINGS[pooling](hidden.float()), dim=-1)


@dataclass
class EmbeddingMetrics:
    """A judge: collects the embeddings of sentences, and compares them once all are there."""

    pooling: str = DEFAULT_POOLING
    tokens: int = 0
    own: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor, output: Tensor, reference: Tensor | None = None) -> None:
        """Take in sentences of one length: tokens (sentences, n), hidden states (sentences, n, width)."""
        self.tokens += tokens.numel()
        self.own.append(embed(output, self.pooling).cpu())
        if reference is None:
            return
        if reference.shape[-1] != output.shape[-1]:
            raise UsageError(
                f"The reference has embeddings of {reference.shape[-1]} numbers and the model of "
                f"{output.shape[-1]}, so they cannot be compared; give the float model it was made from."
            )
        self.reference.append(embed(reference, self.pooling).cpu())

    def result(self) -> dict[str, Any]:
        """The measures as plain data.

        Raises NumericsError when an embedding is not finite, CalibrationError for fewer than two sentences.
        """
        if sum(map(len, self.own)) < 2:
            raise CalibrationError(
                "Fewer than two sentences were embedded, and none has a neighbour; give more text."
            )
        own = torch.cat(self.own)
        if not bool(torch.isfinite(own).all()):
            raise NumericsError("The model's embeddings are NaN or infinite, so it has no use; requantize it.")
        result: dict[str, Any] = {
            "pair_cosine": pair_cosine(own),
            "sentences": len(own),
            "tokens": self.tokens,
            "pooling": self.pooling,
        }
        if self.reference:
            other = torch.cat(self.reference)
            same = (nearest(own) == nearest(other)).double().mean()
            compared = {
                "cosine_similarity": float((own.double() * other.double()).sum(-1).mean()),
                "neighbour_agreement": float(same),
            }
            result = {**compared, **result, "reference_pair_cosine": pair_cosine(other)}
        return result


def pair_cosine(unit: Tensor) -> float:
    """Mean cosine of two different rows of `unit` (n, width), rows of length one."""
    n, total = len(unit), unit.double().sum(0)
    return float((total @ total - unit.double().square().sum()) / (n * (n - 1)))


def nearest(unit: Tensor) -> Tensor:
    """For every row of `unit` (n, width) the other row of greatest cosine, (n,) int64."""
    found = []
    for start in range(0, len(unit), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -torch.inf
        found.append(cosines.argmax(-1))
    return torch.cat(found)
