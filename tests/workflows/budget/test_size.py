"""Budgets as they are written."""

from __future__ import annotations

from fractions import Fraction

import pytest

from bitmill.errors import UsageError
from bitmill.workflows.budget.size import parse_budget


@pytest.mark.parametrize(
    ("text", "bits", "size"),
    [
        ("3.0bpw", Fraction(3), None),
        (" 2.25 BPW ", Fraction(9, 4), None),
        ("70MB", None, 70_000_000),
        ("1.5GiB", None, 3 << 29),
        ("40 kB", None, 40_000),
    ],
)
def test_forms(text, bits, size):
    budget = parse_budget(text)
    assert (budget.bits_per_weight, budget.size_bytes) == (bits, size)
    assert parse_budget(budget.text) == budget


@pytest.mark.parametrize(
    "text", ["", "3", "bpw", "-3bpw", "0bpw", "nan bpw", "3.0.0MB", "8GB at 32k", "65bpw", "9" * 30 + "GB"]
)
def test_others_are_refused(text):
    with pytest.raises(UsageError, match=r"^The budget is .*\.$"):
        parse_budget(text)
