"""Perplexity, KL divergence and top-1 agreement over windows of tokens.

perplexity        exp of the mean next-token loss; every window predicts its tokens 2..n from those before them
perplexity_ratio  perplexity over that of the reference
kl_divergence     mean over all positions of KL(reference || model), in nats per token
kl_interval       ends of its 95 % bootstrap interval, see `bitmill.evaluation.intervals`
kl_p99, kl_p999   99 % and 99.9 % quantiles of the divergence over the positions
top1_agreement    share of positions where the most likely tokens of both models are equal

Over several domains each figure is the mean of those of the domains, the geometric mean for perplexities and their
ratio, whatever the number of their windows; `domains` has the figures of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bitmill.errors import CalibrationError, NumericsError, UsageError
from bitmill.evaluation.figures import WindowSums, domain_figures, text_figures
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

    def result(self, domains: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measures over all batches as plain data.

        Args:
            domains: domain -> number of its windows, in the order in which they were added.
        """
        ...


@dataclass
class LanguageModelMetrics:
    """Sums of every window; call `add` for every batch, then `result`."""

    windows: list[WindowSums] = field(default_factory=list)

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add a batch.

        Args:
            tokens: (windows, length) token ids.
            output: (windows, length, vocabulary) logits of the model.
            reference: logits of the float model.

        Raises:
            UsageError: The vocabularies of both models differ.
        """
        for window, row in enumerate(tokens):
            self.windows.append(WindowSums(len(row)))
            for positions in slices(len(row)):
                following = row[positions.start + 1 : positions.stop + 1]
                expected = None if reference is None else reference[window, positions]
                self._add_positions(following, output[window, positions], expected)

    @property
    def predicted(self) -> int:
        """The number of tokens that were predicted."""
        return sum(window.predicted for window in self.windows)

    def _add_positions(self, following: Tensor, logits: Tensor, expected: Tensor | None) -> None:
        """Add consecutive positions of the last window.

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
        window = self.windows[-1]
        window.predicted += following.numel()
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p = torch.log_softmax(logits[rows].float(), -1)
            window.loss += _loss(log_p, following[rows])
            if expected is None:
                continue
            log_q = torch.log_softmax(expected[rows].to(log_p.device).float(), -1)
            window.reference_loss += _loss(log_q, following[rows])
            q = log_q.exp()  # q = 0 contributes 0, and not 0 * infinity
            divergence = (q * (log_q - log_p)).masked_fill_(q == 0, 0.0)
            window.divergences.append(divergence.sum(-1, dtype=torch.float64).cpu())
            window.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def result(self, domains: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measures as plain data.

        Args:
            domains: domain -> number of its windows, in the order in which they were added. The figures of each
                are in `domains` then, and all others are means over the domains.

        Raises:
            NumericsError: The loss of the model is not finite.
            CalibrationError: No token was predicted.
        """
        if not self.predicted:
            raise CalibrationError(
                "No token was predicted, so there is no perplexity; give windows of at least 2 tokens."
            )
        if not all(math.isfinite(window.loss) for window in self.windows):
            raise NumericsError("The loss is NaN or infinite, so the model has no perplexity; quantize it again.")
        return domain_figures(self.windows, domains) if domains else text_figures(self.windows)


def _loss(log_p: Tensor, following: Tensor) -> float:
    """Return the summed next-token loss of log-probabilities (n, vocabulary) for the tokens that follow."""
    picked = log_p[: following.numel()].gather(1, following[:, None])
    return -float(picked.sum(dtype=torch.float64))


@torch.no_grad()
def score_windows(
    model: OutputFn,
    windows: Tensor | list[Tensor],
    reference: OutputFn | None = None,
    progress: Progress | None = None,
    batch: int = 4,
    metric: Metric | None = None,
    domains: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on windows of tokens.

    Args:
        model: function from tokens (windows, length) to logits, or to the output that `metric` takes.
        windows: token ids (windows, length), or windows of several lengths.
        reference: the float model.
        progress: where progress is reported.
        batch: windows that run at a time.
        metric: an empty metric; perplexity without it.
        domains: domain -> number of its windows, in their order, to be measured apart.

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
    return metric.result(domains)


def batches(windows: Tensor | list[Tensor], batch: int) -> Iterator[Tensor]:
    """Yield up to `batch` consecutive windows of one length at a time, (w, length)."""
    for _, group in itertools.groupby(windows, key=lambda window: window.shape):
        rows = list(group)
        for start in range(0, len(rows), batch):
            yield torch.stack(rows[start : start + batch])
