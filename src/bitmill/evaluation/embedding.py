"""Similarity of the sentence embeddings of an encoder to those of the float model.

cosine_similarity      mean cosine between the embeddings of one sentence in both models
neighbour_agreement    share of sentences whose nearest other sentence, by cosine, agrees between both models
pair_cosine            mean cosine between two different sentences of one model

An encoder predicts no token, so it has no perplexity. `pair_cosine` is the baseline of `cosine_similarity`: where
all embeddings have one direction, a cosine near 1 means little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bitmill.errors import CalibrationError, NumericsError, UsageError
from bitmill.evaluation.logits import DeferredLogits, Output

_ROWS = 1024  # sentences whose cosines to all others are in memory at a time

DEFAULT_POOLING = "mean"
POOLINGS = {
    "mean": lambda hidden: hidden.mean(1),
    "cls": lambda hidden: hidden[:, 0],
    "max": lambda hidden: hidden.amax(1),
}


def embed(hidden: Tensor, pooling: str) -> Tensor:
    """Return embeddings (windows, width) of norm 1.

    Args:
        hidden: (windows, tokens, width) hidden states without padding.
        pooling: "mean", "cls" or "max".
    """
    return normalize(POOLINGS[pooling](hidden.float()), dim=-1)


@dataclass
class EmbeddingMetrics:
    """A metric that collects the embeddings of all sentences and compares them in `result`."""

    pooling: str = DEFAULT_POOLING
    tokens: int = 0
    own: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add sentences of one length.

        Args:
            tokens: (sentences, n) token ids.
            output: (sentences, n, width) hidden states of the model.
            reference: hidden states of the float model.

        Raises:
            UsageError: The widths of both models differ.
        """
        assert isinstance(output, Tensor)  # an encoder has no head
        assert not isinstance(reference, DeferredLogits)
        self.tokens += tokens.numel()
        self.own.append(embed(output, self.pooling).cpu())
        if reference is None:
            return
        if reference.shape[-1] != output.shape[-1]:
            raise UsageError(
                f"The reference has embeddings of width {reference.shape[-1]} and the model of width "
                f"{output.shape[-1]}, so they cannot be compared; give the float model it was made from."
            )
        self.reference.append(embed(reference, self.pooling).cpu())

    def result(self, domains: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measures as plain data.

        Args:
            domains: not used: sentences of all domains are neighbours.

        Raises:
            NumericsError: An embedding is not finite.
            CalibrationError: There are fewer than two sentences.
        """
        if sum(map(len, self.own)) < 2:
            raise CalibrationError(
                "Fewer than two sentences were embedded, so there are no neighbours; give more text."
            )
        own = torch.cat(self.own)
        if not bool(torch.isfinite(own).all()):
            raise NumericsError("The embeddings of the model are NaN or infinite; quantize it again.")
        result: dict[str, Any] = {
            "pair_cosine": pair_cosine(own),
            "sentences": len(own),
            "tokens": self.tokens,
            "pooling": self.pooling,
        }
        if self.reference:
            other = torch.cat(self.reference)
            agreement = (nearest(own) == nearest(other)).double().mean()
            compared = {
                "cosine_similarity": float((own.double() * other.double()).sum(-1).mean()),
                "neighbour_agreement": float(agreement),
            }
            result = {**compared, **result, "reference_pair_cosine": pair_cosine(other)}
        return result


def pair_cosine(unit: Tensor) -> float:
    """Return the mean cosine of two different rows of `unit` (n, width), whose rows have norm 1."""
    n, total = len(unit), unit.double().sum(0)
    return float((total @ total - unit.double().square().sum()) / (n * (n - 1)))


def nearest(unit: Tensor) -> Tensor:
    """Return for every row of `unit` (n, width) the index of the other row of largest cosine, (n,) int64."""
    found = []
    for start in range(0, len(unit), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -torch.inf
        found.append(cosines.argmax(-1))
    return torch.cat(found)
