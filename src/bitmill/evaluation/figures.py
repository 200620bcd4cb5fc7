"""Figures of windows, of one text or by domain, from the sums of every window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmill.evaluation.intervals import SEED, bootstrap_means, percentile_interval

_QUANTILES = {"kl_p99": 0.99, "kl_p999": 0.999}
_GEOMETRIC = ("perplexity", "reference_perplexity", "perplexity_ratio")  # their logarithms are averaged
Figures = dict[str, Any]


@dataclass
class WindowSums:
    """Sums over the positions of one window.

    tokens: length of the window.
    divergences: KL(reference || model) at consecutive positions, (n,) in pieces; empty without a reference.
    """

    tokens: int
    loss: float = 0.0
    reference_loss: float = 0.0
    predicted: int = 0
    agreed: int = 0
    divergences: list[Tensor] = field(default_factory=list)


def text_figures(windows: Sequence[WindowSums]) -> Figures:
    """Return the figures of windows of one text."""
    return _with_interval(*_figures(windows, np.random.default_rng(SEED)))


def domain_figures(windows: Sequence[WindowSums], domains: Mapping[str, int]) -> Figures:
    """Return the means over domains and, in `domains`, the figures of each.

    Args:
        windows: domain after domain.
        domains: domain -> number of its windows.
    """
    remaining, generator = iter(windows), np.random.default_rng(SEED)
    found = {
        name: _figures(list(itertools.islice(remaining, count)), generator) for name, count in domains.items()
    }
    each = [figures for figures, _ in found.values()]
    resampled = [means for _, means in found.values() if means is not None]
    mean = {
        **{key: _mean([figures[key] for figures in each], key in _GEOMETRIC) for key in each[0]},
        "tokens": sum(figures["tokens"] for figures in each),
    }
    return {
        **_with_interval(mean, np.mean(resampled, axis=0) if resampled else None),
        "domains": {
            name: {"windows": domains[name], **_with_interval(figures, means)}
            for name, (figures, means) in found.items()
        },
    }


def _figures(windows: Sequence[WindowSums], generator: np.random.Generator) -> tuple[Figures, np.ndarray | None]:
    """Return the figures of windows, and the resampled means of their divergence where there is a reference."""
    predicted = sum(window.predicted for window in windows)
    loss = math.fsum(window.loss for window in windows) / predicted
    figures: Figures = {"perplexity": _exp(loss), "tokens": sum(window.tokens for window in windows)}
    if not windows[0].divergences:
        return figures, None
    reference_loss = math.fsum(window.reference_loss for window in windows) / predicted
    by_window = [torch.cat(window.divergences) for window in windows]
    divergences = torch.cat(by_window).numpy()
    figures |= {
        "kl_divergence": float(divergences.mean()),
        **{key: _quantile(divergences, share) for key, share in _QUANTILES.items()},
        "top1_agreement": sum(window.agreed for window in windows) / len(divergences),
        "reference_perplexity": _exp(reference_loss),
        "perplexity_ratio": _exp(loss - reference_loss),
    }
    return figures, bootstrap_means(by_window, generator)


def _with_interval(figures: Figures, means: np.ndarray | None) -> Figures:
    return figures if means is None else {**figures, "kl_interval": percentile_interval(means)}


def _mean(values: Sequence[float], geometric: bool) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if geometric else float(np.mean(values))


def _quantile(values: np.ndarray, share: float) -> float:
    """Return the smallest value that is no smaller than this share of the values; finite if that value is."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def _exp(mean_loss: float) -> float:
    """Return the perplexity of a mean loss, finite also where exp overflows."""
    return math.exp(min(mean_loss, 700.0))
