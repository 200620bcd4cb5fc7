"""Perplexity, divergence and agreement against a computation in plain float64."""

from __future__ import annotations

import math

import pytest
import torch

from bitmill.errors import NumericsError
from bitmill.evaluation.metrics import LanguageModelMetrics, score_windows

VOCABULARY = 23


def table_model(seed: int):
    """Logits that depend on the token alone."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda tokens: table[tokens]


def naive(model, windows, reference):
    loss, predicted, divergence, agreed, positions = 0.0, 0, 0.0, 0, 0
    for window in windows:
        p = torch.softmax(model(window[None])[0].double(), -1)
        q = torch.softmax(reference(window[None])[0].double(), -1)
        for t in range(len(window)):
            if t + 1 < len(window):
                loss -= math.log(p[t, window[t + 1]])
                predicted += 1
            divergence += float((q[t] * (q[t] / p[t]).log()).sum())
            agreed += int(p[t].argmax() == q[t].argmax())
            positions += 1
    return math.exp(loss / predicted), divergence / positions, agreed / positions


@pytest.mark.parametrize("length", [2, 17, 256, 257, 300])  # softmax runs over 256 positions at a time
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_equals_naive_computation(length, batch):
    windows = torch.randint(0, VOCABULARY, (3, length))
    model, reference = table_model(0), table_model(1)
    result = score_windows(model, windows, reference, batch=batch)
    perplexity, divergence, agreement = naive(model, windows, reference)
    assert result["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert result["kl_divergence"] == pytest.approx(divergence, rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(agreement)
    assert result["reference_perplexity"] == pytest.approx(naive(reference, windows, model)[0], rel=1e-5)
    assert result["tokens"] == 3 * length


def test_identical_models_agree():
    windows = torch.randint(0, VOCABULARY, (2, 40))
    result = score_windows(table_model(0), windows, table_model(0))
    assert result["kl_divergence"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity"] == result["reference_perplexity"]


def test_uniform_logits():
    windows = torch.randint(0, VOCABULARY, (2, 40))
    result = score_windows(lambda tokens: torch.zeros(*tokens.shape, VOCABULARY), windows)
    assert result["perplexity"] == pytest.approx(VOCABULARY)
    assert "kl_divergence" not in result


def test_half_precision_logits():
    windows = torch.randint(0, VOCABULARY, (2, 40))
    model = table_model(0)
    half = score_windows(lambda tokens: model(tokens).bfloat16(), windows)
    single = score_windows(lambda tokens: model(tokens).bfloat16().float(), windows)
    assert half == single


def test_incremental_windows():
    windows = torch.randint(0, VOCABULARY, (3, 30))
    model, reference = table_model(0), table_model(1)
    sums = LanguageModelMetrics()
    for window in windows:
        sums.add(window[None], model(window[None]), reference(window[None]))
    assert sums.result() == score_windows(model, windows, reference, batch=1)


def test_nonfinite_perplexity_refused():
    windows = torch.randint(0, VOCABULARY, (1, 10))
    with pytest.raises(NumericsError, match="no perplexity"):
        score_windows(lambda tokens: torch.full((*tokens.shape, VOCABULARY), math.nan), windows)


def test_impossible_tokens_ignored():
    windows = torch.randint(1, VOCABULARY, (2, 10))

    def ruled_out(model, logit):
        return lambda tokens: torch.cat([torch.full((*tokens.shape, 1), logit), model(tokens)[..., 1:]], -1)

    model, reference = table_model(0), table_model(1)
    expected = score_windows(ruled_out(model, -60.0), windows, ruled_out(reference, -60.0))["kl_divergence"]
    for logit in (-1e30, -math.inf):
        found = score_windows(ruled_out(model, logit), windows, ruled_out(reference, -math.inf))["kl_divergence"]
        assert found == pytest.approx(expected, rel=1e-6)


def test_no_overflow():
    windows = torch.zeros(1, 10, dtype=torch.long)
    logits = torch.zeros(1, 10, VOCABULARY)
    logits[..., 0] = -1e30
    assert math.isfinite(score_windows(lambda tokens: logits, windows)["perplexity"])
