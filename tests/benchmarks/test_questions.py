"""A hundred questions: what counts as right, and the exact interval."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def questions(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import questions

    return questions


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is The 'Eiffel-Tower'.", True),
        ("it is an eiffel tower", True),
        ("The Eiffel Towers", False),
        ("a tower in Paris", False),  # the question names Paris
    ],
)
def test_right_answers(questions, answer, right):
    asked = {"question": "What stands in Paris?", "answers": ["The Eiffel Tower", "Paris", "x"]}
    assert questions.is_right(answer, asked) is right


def test_frozen_questions(questions):
    rows = [json.loads(line) for line in questions.FROZEN.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["source"] for row in rows) == questions.COUNTS
    assert len({row["sha256"] for row in rows}) == 100
