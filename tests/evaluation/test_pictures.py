"""Figures of pictures: labels of the nearest neighbours, against the float model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from bitmill.errors import CalibrationError
from bitmill.evaluation.pictures import PictureMetrics, labels_of, neighbours_agree


def hidden(features: torch.Tensor) -> torch.Tensor:
    """Hidden states whose class token has these features."""
    return torch.cat([features[:, None], torch.randn(len(features), 4, features.shape[1])], 1)


def clusters(noise: float) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.eye(2, 6).repeat_interleave(15, 0) + noise * torch.randn(30, 6)


def test_separated_labels_are_found():
    metric = PictureMetrics()
    metric.add(torch.zeros(30, 3, 4, 4), hidden(clusters(0.1)), hidden(clusters(0.1)))
    result = metric.result({"a": 15, "b": 15})
    assert result["knn_accuracy"] == result["reference_knn_accuracy"] == 1.0
    assert result["cosine_similarity"] == pytest.approx(1.0)
    assert result["knn_change_interval"] == [0.0, 0.0]
    assert result["pictures"] == 30


def test_labels_follow_the_counts():
    assert labels_of({"a": 2, "b": 0, "c": 1}).tolist() == [0, 0, 2]


def test_neighbours_by_brute_force():
    unit = normalize(clusters(0.8), dim=-1)
    labels = torch.arange(2).repeat_interleave(15)
    expected = []
    for index, row in enumerate(unit):
        others = [k for k in range(30) if k != index]
        near = sorted(others, key=lambda k: -float(row @ unit[k]))[:10]
        votes = [sum(int(labels[k]) == c for k in near) for c in (0, 1)]
        expected.append(votes.index(max(votes)) == int(labels[index]))
    assert neighbours_agree(unit, labels).tolist() == expected


def test_logits_give_accuracies():
    logits, labels = torch.randn(30, 3), torch.arange(3).repeat_interleave(10)
    metric = PictureMetrics()
    metric.add(torch.zeros(30, 3, 4, 4), logits, logits.clone())
    result = metric.result({"a": 10, "b": 10, "c": 10})
    assert result["top1_agreement"] == 1.0
    assert result["top1_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))


def test_without_labels_only_similarities():
    metric = PictureMetrics()
    metric.add(torch.zeros(30, 3, 4, 4), hidden(clusters(0.1)))
    assert "knn_accuracy" not in metric.result({})
    with pytest.raises(CalibrationError):
        PictureMetrics().result()
