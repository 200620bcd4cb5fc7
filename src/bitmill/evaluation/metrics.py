"""Perplexity, KL divergence and top-1 agreement over windows of tokens.

perplexity      exp of the mean next-token loss; every window predicts its tokens 2..n from those before them
kl_divergence   mean over all positions of KL(reference || model), in nats per token
top1_agreement  share of positions where the most likely tokens of both models are equal
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bitmill.errors import CalibrationError, NumericsError, UsageError
from bitmill.evaluation.logits import Output, OutputFn, slices
from bitmill.progress import Progress

_ROWS = 32  # positions whose softmax is in memory at a time: over 262,144 words 34 MB in fp32, for each temporary


class Metric(Protocol):
    """Measures of a model over windows of tokens, with or without a float reference."""

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add a batch.

        Args:
            tokens: (windows, length) token ids.
            output: (windows, length, n) logits or hidden states of the model for these tokens.
            reference: those of the float model.
        """
        ...

    def result(self) -> dict[str, Any]:
        """Return the measures over all batches as plain data."""
        ...


@dataclass
class LanguageModelMetrics:
    """Sums over windows; call `add` for every batch, then `result`."""

    loss: float = 0.0
    reference_loss: float = 0.0
    predicted: int = 0
    divergence: float = 0.0
    agreed: int = 0
    positions: int = 0
    tokens: int = 0
    compared: bool = field(default=False)

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add a batch.

        Args:
            tokens: (windows, length) token ids.
            output: (windows, length, vocabulary) logits of the model.
            reference: logits of the float model.

        Raises:
            UsageError: The vocabularies of both models differ.
        """
        self.tokens += tokens.numel()
        for window, row in enumerate(tokens):
            for positions in slices(len(row)):
                following = row[positions.start + 1 : positions.stop + 1]
                expected = None if reference is None else reference[window, positions]
                self._add_positions(following, output[window, positions], expected)

    def _add_positions(self, following: Tensor, logits: Tensor, expected: Tensor | None) -> None:
        """Add consecutive positions of a window.

        Args:
            following: (n,) the tokens that follow them, or (n - 1,) at the end of the window.
            logits: (n, vocabulary) of the model.
            expected: (n, vocabulary) of the float model.
        """
        if expected is not None and expected.shape[-1] != logits.shape[-1]:
            raise UsageError(
                f"The reference has a vocabulary of {expected.shape[-1]} and the model one of "
                f"{logits.shape[-1]}, so they cannot be compared; give the float model it was made from."
            )
        following = following.to(logits.device)
        self.predicted += following.numel()
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p = torch.log_softmax(logits[rows].float(), -1)
            self.loss += _loss(log_p, following[rows])
            if expected is None:
                continue
            log_q = torch.log_softmax(expected[rows].to(log_p.device).float(), -1)
            self.compared = True
            self.reference_loss += _loss(log_q, following[rows])
            q = log_q.exp()  # q = 0 contributes 0, and not 0 * infinity
            divergence = (q * (log_q - log_p)).masked_fill_(q == 0, 0.0)
            self.divergence += float(divergence.sum(dtype=torch.float64))
            self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self.positions += log_p.shape[0]

    def result(self) -> dict[str, float | int]:
        """Return the measures as plain numbers.

        Raises:
            NumericsError: The loss of the model is not finite.
            CalibrationError: No token was predicted.
        """
        if not self.predicted:
            raise CalibrationError(
                "No token was predicted, so there is no perplexity; give windows of at least 2 tokens."
            )
        if not math.isfinite(self.loss):
            raise NumericsError("The loss is NaN or infinite, so the model has no perplexity; quantize it again.")
        result: dict[str, float | int] = {
            "perplexity": _exp(self.loss / self.predicted),
            "tokens": self.tokens,
        }
        if self.compared:
            result["kl_divergence"] = self.divergence / self.positions
            result["top1_agreement"] = self.agreed / self.positions
            result["reference_perplexity"] = _exp(self.reference_loss / self.predicted)
        return result


def _loss(log_p: Tensor, following: Tensor) -> float:
    """Return the summed next-token loss of log-probabilities (n, vocabulary) for the tokens that follow."""
    picked = log_p[: following.numel()].gather(1, following[:, None])
    return -float(picked.sum(dtype=torch.float64))


def _exp(mean_loss: float) -> float:
    """Return the perplexity of a mean loss, finite also where exp overflows."""
    return math.exp(min(mean_loss, 700.0))


@torch.no_grad()
def score_windows(
    model: OutputFn,
    windows: Tensor | list[Tensor],
    reference: OutputFn | None = None,
    progress: Progress | None = None,
    batch: int = 4,
    metric: Metric | None = None,
) -> dict[str, Any]:
    """Evaluate a model on windows of tokens.

    Args:
        model: function from tokens (windows, length) to logits, or to the output that `metric` takes.
        windows: token ids (windows, length), or windows of several lengths.
        reference: the float model.
        progress: where progress is reported.
        batch: windows that run at a time.
        metric: an empty metric; perplexity without it.

    Returns:
        The result of the metric.
    """
    progress = progress or Progress()
    metric = metric or LanguageModelMetrics()
    progress.start("evaluate", len(windows))
    for tokens in batches(windows, batch):
        metric.add(tokens, model(tokens), reference(tokens) if reference else None)
        progress.advance(tokens.shape[0])
    progress.finish()
    return metric.result()


def batches(windows: Tensor | list[Tensor], batch: int) -> Iterator[Tensor]:
    """Yield up to `batch` consecutive windows of one length at a time, (w, length)."""
    for _, group in itertools.groupby(windows, key=len):
        rows = list(group)
        for start in range(0, len(rows), batch):
            yield torch.stack(rows[start : start + batch])
