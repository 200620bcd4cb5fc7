"""Figures of tasks follow lm-eval's definitions."""

from __future__ import annotations

import math

import pytest

from bitmill.evaluation.likelihood import figures

CHOICES = [" four", " fortytwo"]  # 4 and 8 characters


def test_accuracy_by_sum_and_by_character():
    scored = [[(-2.0, False), (-3.0, False)]] * 4  # per character -0.5 and -0.375
    found = figures(("acc", "acc_norm"), scored, [CHOICES] * 4, [0, 0, 1, 0])
    assert found["acc"] == 0.75
    assert found["acc_norm"] == 0.25
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # of a mean: s / sqrt(n)
    assert found["acc_norm_stderr"] == pytest.approx(found["acc_stderr"])


def test_last_word():
    logps = [-1.0, -2.0, -3.0]
    scored = [[(logp, logp > -2.5)] for logp in logps]
    found = figures(("acc", "perplexity"), scored, [[" word"]] * 3, [0] * 3)
    assert found["acc"] == pytest.approx(2 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["perplexity_stderr"] == pytest.approx(math.exp(2) / math.sqrt(3))


def test_one_document_has_no_error():
    assert figures(("acc",), [[(-1.0, True)]], [[" word"]], [0]) == {"acc": 1.0, "acc_stderr": None}
