"""Numbers as people read them."""

from __future__ import annotations

import pytest

from bitmill.report import formatting


def spaced(shown: str) -> str:
    return shown.replace(formatting.GAP, " ").replace(formatting.NARROW, " ")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (0, "0"), (11.2345, "11.23"), (41.3, "41.30"), (694, "694.0"), (4100.4, "4100"),
        (9999.6, "10 000"), (13535.2, "13 535"), (689134.0, "6.9×10⁵"), (1.5e300, "1.5×10³⁰⁰"),
        (0.0307, "0.03070"), (3.2e-5, "3.2×10⁻⁵"), (-2.5, "-2.500"),
    ],
)  # fmt: skip
def test_number(value, shown):
    assert spaced(formatting.number(value)) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (999, "999 B"), (45300, "45.3 kB"), (112e6, "112 MB"), (1.6e9, "1.60 GB")]
)
def test_size(value, shown):
    assert spaced(formatting.size(value)) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (1.98, "2.0 s"),
        (9.97, "10 s"),
        (119.6, "2 min 00 s"),
        (175, "2 min 55 s"),
        (7325, "2 h 02 min"),
    ],
)
def test_duration(value, shown):
    assert spaced(formatting.duration(value)) == shown


@pytest.mark.parametrize(
    ("value", "reference", "shown"),
    [
        (12.67, 11.23, "+12.8 %"), (11.0, 11.23, "−2.0 %"), (11.23, 11.23, "±0.0 %"), (23.92, 11.23, "×2.13"),
        (None, 11.23, "–"), (12.0, None, "–"),
    ],
)  # fmt: skip
def test_change(value, reference, shown):
    assert spaced(formatting.change(value, reference)) == shown


def test_percent_and_plural():
    assert spaced(formatting.percent(0.987)) == "98.7 %"
    assert formatting.percent(None) == "–"
    counts = [spaced(formatting.plural(n, "variant")) for n in (0, 1, 2)]
    assert counts == [
        "0 variants",
        "1 variant",
        "2 variants",
    ]
