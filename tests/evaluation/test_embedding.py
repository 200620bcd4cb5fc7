"""Metrics of embeddings equal their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from bitmill.errors import CalibrationError, NumericsError, UsageError
from bitmill.evaluation import embedding
from bitmill.evaluation.embedding import EmbeddingMetrics, embed, nearest, pair_cosine
from bitmill.evaluation.metrics import score_windows

GENERATOR = torch.Generator().manual_seed(3)
HIDDEN = torch.randn(40, 6, 16, generator=GENERATOR) + 0.5
OTHER = HIDDEN + 0.3 * torch.randn(40, 6, 16, generator=GENERATOR)
TOKENS = torch.arange(240).view(40, 6)


def test_poolings():
    for pooling, expected in (("mean", HIDDEN.mean(1)), ("cls", HIDDEN[:, 0]), ("max", HIDDEN.amax(1))):
        assert torch.allclose(embed(HIDDEN, pooling), expected / expected.norm(dim=-1, keepdim=True))


def test_metric_definitions(monkeypatch):
    monkeypatch.setattr(embedding, "_ROWS", 7)  # as if there were too many sentences to hold
    result = score_windows(
        lambda t: HIDDEN[t[:, 0] // 6], TOKENS, lambda t: OTHER[t[:, 0] // 6], None, 16, EmbeddingMetrics()
    )
    own, other = HIDDEN.mean(1), OTHER.mean(1)
    table, reference = (cosine_similarity(e[:, None], e[None], dim=-1) for e in (own, other))
    off = ~torch.eye(40, dtype=torch.bool)
    assert result["cosine_similarity"] == pytest.approx(float(cosine_similarity(own, other).mean()), abs=1e-6)
    assert result["pair_cosine"] == pytest.approx(float(table[off].mean()), abs=1e-6)
    assert result["reference_pair_cosine"] == pytest.approx(float(reference[off].mean()), abs=1e-6)
    found = [t.masked_fill(~off, -2).argmax(-1) for t in (table, reference)]
    assert 0 < result["neighbour_agreement"] < 1
    assert result["neighbour_agreement"] == pytest.approx(float((found[0] == found[1]).double().mean()))
    assert (result["sentences"], result["tokens"], result["pooling"]) == (40, 240, "mean")
    assert "perplexity" not in result


def test_identical_models_agree():
    metric = EmbeddingMetrics()
    metric.add(TOKENS, HIDDEN, HIDDEN)
    result = metric.result()
    assert result["cosine_similarity"] == pytest.approx(1)
    assert result["neighbour_agreement"] == 1
    assert result["pair_cosine"] == result["reference_pair_cosine"]


def test_no_reference():
    metric = EmbeddingMetrics("cls")
    metric.add(TOKENS, HIDDEN)
    assert set(metric.result()) == {"pair_cosine", "sentences", "tokens", "pooling"}


def test_batches_by_length():
    shapes = []

    def model(tokens):
        shapes.append(tuple(tokens.shape))
        return torch.ones(*tokens.shape, 4)

    sentences = [torch.zeros(n, dtype=torch.int64) for n in (3, 3, 3, 5, 8, 8)]
    score_windows(model, sentences, batch=2, metric=EmbeddingMetrics())
    assert shapes == [(2, 3), (1, 3), (1, 5), (2, 8)]


def test_neighbors_and_pairs():
    unit = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert nearest(unit).tolist() == [2, 2, 1]
    assert pair_cosine(unit) == pytest.approx((0.0 + 0.6 + 0.8) / 3)


def test_invalid_embeddings_refused():
    with pytest.raises(CalibrationError, match="Fewer than two"):
        EmbeddingMetrics().result()
    metric = EmbeddingMetrics()
    metric.add(TOKENS, HIDDEN * math.nan)
    with pytest.raises(NumericsError, match="NaN"):
        metric.result()
    with pytest.raises(UsageError, match="embeddings of width 8 and the model of width 16"):
        EmbeddingMetrics().add(TOKENS, HIDDEN, HIDDEN[..., :8])
