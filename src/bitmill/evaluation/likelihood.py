"""Figures of benchmark tasks from the log-likelihoods of their answers, defined as in lm-eval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Scored = tuple[float, bool]  # log-likelihood in nats, and the continuation is what greedy decoding writes


def accuracy(scored: Sequence[Scored], continuations: Sequence[str], label: int) -> float:
    """Return 1 where the likeliest choice is right; a single choice is right where greedy decoding writes it."""
    if len(scored) == 1:
        return float(scored[0][1])
    return float(_best([logp for logp, _ in scored]) == label)


def normalized_accuracy(scored: Sequence[Scored], continuations: Sequence[str], label: int) -> float:
    """Return 1 where the choice of the highest log-likelihood per character is right.

    The space between context and continuation does not count as a character.
    """
    lengths = [len(text.removeprefix(" ")) for text in continuations]
    return float(_best([logp / length for (logp, _), length in zip(scored, lengths, strict=True)]) == label)


def log_likelihood(scored: Sequence[Scored], continuations: Sequence[str], label: int) -> float:
    """Return the log-likelihood of the right choice, in nats."""
    return scored[label][0]


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; None for a single value."""
    average = statistics.fmean(values)
    return average, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def exponential_mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Return exp(-mean) and its standard error, to first order in that of the mean."""
    average, error = mean(values)
    perplexity = math.exp(min(-average, 700.0))  # finite also where exp overflows
    return perplexity, None if error is None else perplexity * error


# metric -> its value for a document, and how those of all documents become a figure with its standard error
METRICS = {
    "acc": (accuracy, mean),
    "acc_norm": (normalized_accuracy, mean),
    "perplexity": (log_likelihood, exponential_mean),
}


def figures(
    metrics: Sequence[str],
    scored: Sequence[Sequence[Scored]],
    continuations: Sequence[Sequence[str]],
    labels: Sequence[int],
) -> dict[str, float | None]:
    """Return every metric and its standard error, as `NAME` and `NAME_stderr`.

    Args:
        metrics: names of metrics.
        scored: of the choices of each document.
        continuations: texts of the choices of each document.
        labels: number of the right choice of each document.
    """
    found: dict[str, float | None] = {}
    for name in metrics:
        value, aggregate = METRICS[name]
        values = [value(*document) for document in zip(scored, continuations, labels, strict=True)]
        found[name], found[f"{name}_stderr"] = aggregate(values)
    return found


def _best(scores: Sequence[float]) -> int:
    """Return the number of the first highest score."""
    return max(range(len(scores)), key=scores.__getitem__)
