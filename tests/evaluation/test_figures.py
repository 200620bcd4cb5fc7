"""Figures by domain, quantiles and bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitmill.evaluation.intervals import bootstrap_means, percentile_interval
from bitmill.evaluation.metrics import LanguageModelMetrics, score_windows

VOCABULARY, LENGTH = 23, 256
DOMAINS = {"prose": 3, "code": 1, "dialogue": 2}


def table_model(seed: int):
    """Logits that depend on the token alone."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda tokens: table[tokens]


def some_windows(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(7))


def divergences(windows) -> np.ndarray:
    """KL of every position, (windows, length)."""
    log_p, log_q = (torch.log_softmax(table_model(seed)(windows).double(), -1) for seed in (0, 1))
    return (log_q.exp() * (log_q - log_p)).sum(-1).numpy()


def measure(windows, domains=None):
    return score_windows(table_model(0), windows, table_model(1), batch=2, domains=domains)


def test_quantiles_and_interval():
    windows = some_windows(4)
    found, expected = measure(windows), divergences(windows)
    assert found["kl_divergence"] == pytest.approx(expected.mean(), rel=1e-5)
    for key, share in (("kl_p99", 0.99), ("kl_p999", 0.999)):
        assert found[key] == pytest.approx(np.quantile(expected, share, method="inverted_cdf"), rel=1e-5)
    low, high = found["kl_interval"]
    assert low < found["kl_divergence"] < high
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["reference_perplexity"])
    assert measure(windows) == found  # seeded


def test_intervals_are_of_windows():
    """Windows whose positions agree have the interval of their means, however many positions they have."""
    values = np.random.default_rng(0).normal(size=20)
    for length in (1, 50):
        windows = [torch.full((length,), float(value)) for value in values]
        low, high = percentile_interval(bootstrap_means(windows, np.random.default_rng(0)))
        error = values.std(ddof=1) / math.sqrt(20)
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_a_single_window_has_an_interval():
    low, high = percentile_interval(bootstrap_means([torch.rand(64)], np.random.default_rng(0)))
    assert low < high
    one = bootstrap_means([torch.tensor([3.0])], np.random.default_rng(0))
    assert percentile_interval(one) == [3.0, 3.0]


def test_intervals_shrink_with_windows():
    widths = [np.ptp(measure(some_windows(count))["kl_interval"]) for count in (8, 32, 128)]
    assert widths[0] > 1.4 * widths[1] > 2 * widths[2] > 0


def test_domains_and_their_mean():
    windows = some_windows(6)
    found = measure(windows, DOMAINS)
    each, start = found["domains"], 0
    assert list(each) == list(DOMAINS)
    for name, count in DOMAINS.items():
        alone = measure(windows[start : start + count])
        start += count
        of = each[name]
        assert of["windows"] == count
        assert {key: of[key] for key in alone if key != "kl_interval"} == pytest.approx(
            {key: value for key, value in alone.items() if key != "kl_interval"}
        )
        assert of["kl_interval"][0] < of["kl_divergence"] < of["kl_interval"][1]
    for key in ("kl_divergence", "kl_p99", "kl_p999", "top1_agreement"):
        assert found[key] == pytest.approx(np.mean([of[key] for of in each.values()]))
    for key in ("perplexity", "reference_perplexity", "perplexity_ratio"):
        assert found[key] == pytest.approx(math.exp(np.mean([math.log(of[key]) for of in each.values()])))
    assert found["tokens"] == 6 * LENGTH
    assert found["kl_interval"][0] < found["kl_divergence"] < found["kl_interval"][1]
    assert np.ptp(found["kl_interval"]) < min(np.ptp(of["kl_interval"]) for of in each.values())


def test_domains_without_a_reference():
    found = score_windows(table_model(0), some_windows(6), domains=DOMAINS)
    assert set(found) == {"perplexity", "tokens", "domains"}
    assert set(found["domains"]["code"]) == {"perplexity", "tokens", "windows"}


def test_impossible_tokens_leave_finite_quantiles():
    """A token that the model rules out and the reference does not has an infinite divergence."""
    logits = torch.zeros(1, LENGTH, VOCABULARY)
    ruled_out = logits.clone()
    ruled_out[0, 5, 3] = -math.inf
    metric = LanguageModelMetrics()
    metric.add(torch.zeros(1, LENGTH, dtype=torch.int64), ruled_out, logits)
    found = metric.result()
    assert found["kl_divergence"] == math.inf
    assert found["kl_p99"] == pytest.approx(0, abs=1e-6)
    assert found["kl_p999"] == math.inf
