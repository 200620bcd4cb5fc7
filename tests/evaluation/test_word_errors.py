"""Word error rates, their intervals and the matched-pairs test."""

from __future__ import annotations

import math

import pytest

from bitmill.evaluation.word_errors import WordErrors, count_errors


def test_counts():
    pytest.importorskip("jiwer")
    found = count_errors(["a b c", "a b", "a"], ["a x c d", "", "a"])
    assert found == WordErrors((2, 2, 0), (3, 2, 1))
    assert found.rate == pytest.approx(4 / 6)


def test_interval_narrows_with_utterances():
    few, many = (WordErrors((1, 0, 2, 0) * n, (5, 6, 7, 8) * n) for n in (5, 50))
    for errors in (few, many):
        low, high = errors.interval()
        assert low < errors.rate < high
    assert math.isclose(few.rate, many.rate)
    widths = [high - low for low, high in (few.interval(), many.interval())]
    assert widths[1] < widths[0] / 2


def test_matched_pairs():
    one = WordErrors((2, 1, 3, 0, 2, 1, 4, 2), (9,) * 8)
    assert one.matched_pairs(one) == 1.0
    better = WordErrors((1, 0, 2, 0, 1, 0, 3, 1), (9,) * 8)
    assert one.matched_pairs(better) < 0.01  # 7 of 8 utterances have one error less
    low, high = better.difference_interval(one)
    assert low < high < 0
    mixed = WordErrors((3, 0, 4, 1, 1, 0, 5, 1), (9,) * 8)
    assert one.matched_pairs(mixed) > 0.5
