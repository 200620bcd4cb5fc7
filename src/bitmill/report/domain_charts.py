"""Small charts by domain: bars of one folder's figures, and the divergence of every variant by its bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bitmill.report import formatting
from bitmill.report.charts import Marker, log_ticks
from bitmill.report.comparison import in_order
from bitmill.report.domains import compared_columns, domains_of
from bitmill.report.metrics import Measurement, MetricColumn
from bitmill.report.results import DomainFigures, Results, Variant

_NAME, _BAR, _VALUE, _PITCH = 104, 118, 58, 24  # pixels of the bars: names, bars, values, one row
_CHARTED = ("kl_divergence", "kl_p999", "perplexity_ratio", "top1_agreement")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 215, 200, 40, 12, 26  # pixels of a panel, and its margins


@dataclass(frozen=True)
class Bar:
    """A domain in a panel of bars.

    y: its top.
    length: of the bar.
    whisker: both ends of the interval; None without one.
    shown: the value as text.
    """

    name: str
    y: int
    length: float
    whisker: tuple[float, float] | None
    shown: str


@dataclass(frozen=True)
class BarPanel:
    """One figure of all domains as bars, in pixels of an SVG."""

    title: str
    bars: list[Bar]
    left: int = _NAME
    width: int = _NAME + _BAR + _VALUE

    @property
    def height(self) -> int:
        """Height of the panel."""
        return _PITCH * len(self.bars) + 4


def domain_bars(measurement: Measurement | None) -> list[BarPanel]:
    """Return a panel for each of the figures that matter most; none without domains."""
    domains = domains_of(measurement or {})
    return [_bar_panel(column, domains) for column in compared_columns(domains) if column.key in _CHARTED]


def _bar_panel(column: MetricColumn, domains: Mapping[str, Measurement]) -> BarPanel:
    ends = [of.get(column.interval) for of in domains.values()] if column.interval else [None] * len(domains)
    values = [of[column.key] for of in domains.values()]
    most = max([*values, *(end[1] for end in ends if end)]) or 1.0
    bars = [
        Bar(
            name,
            _PITCH * row,
            round(_BAR * of[column.key] / most, 1),
            (round(_BAR * end[0] / most, 1), round(_BAR * end[1] / most, 1)) if end else None,
            column.display(of),
        )
        for row, ((name, of), end) in enumerate(zip(domains.items(), ends, strict=True))
    ]
    return BarPanel(column.title, bars)


@dataclass(frozen=True)
class Point:
    """A variant in the panel of a domain.

    x, y: its place.
    low, high: places of both ends of its interval.
    """

    variant: Variant
    marker: Marker
    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class ScatterPanel:
    """The KL divergence of every variant on one domain by bits per weight; all panels have equal axes.

    x_ticks, y_ticks: places and texts.
    """

    name: str
    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    bottom: int = field(default=_HEIGHT - _BOTTOM)


def domain_panels(results: Results, markers: Mapping[str, Marker]) -> list[ScatterPanel]:
    """Return one panel for each domain; none where the comparison was not measured by domain.

    Args:
        results: the comparison.
        markers: of each method.
    """
    placed = [
        (variant, name, of)
        for variant in in_order(results)
        for name, of in variant.domains.items()
        if of.kl_divergence and math.isfinite(of.kl_divergence) and variant.bits_per_weight is not None
    ]
    if not placed:
        return []
    bits = [variant.bits_per_weight or 0.0 for variant, _, _ in placed]
    ends = [end for _, _, of in placed for end in _ends(of)]
    across = _Axis(min(bits) - 0.4, max(bits) + 0.4, _LEFT, _WIDTH - 6)
    up = _Axis(math.log(min(ends) / 1.25), math.log(max(ends) * 1.25), _HEIGHT - _BOTTOM, _TOP)
    x_ticks = [(across.at(n), str(n)) for n in range(math.ceil(across.low), math.floor(across.high) + 1)]
    round_values = log_ticks(math.exp(up.low), math.exp(up.high))
    y_ticks = [(up.at(math.log(value)), formatting.number(value, 1)) for value in round_values]
    return [
        ScatterPanel(
            name,
            [_point(v, markers[v.method], of, across, up) for v, domain, of in placed if domain == name],
            x_ticks,
            y_ticks,
        )
        for name in dict.fromkeys(domain for _, domain, _ in placed)
    ]


@dataclass(frozen=True)
class _Axis:
    """A linear axis from two values to two places."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the place of a value."""
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 1)


def _point(variant: Variant, marker: Marker, of: DomainFigures, across: _Axis, up: _Axis) -> Point:
    low, high = (up.at(math.log(end)) for end in _ends(of))
    value = of.kl_divergence or 0.0
    text = f"{variant.name}: {formatting.number(value, 3)} nats"
    if of.kl_interval:
        text += f" ({' to '.join(formatting.number(end, 3) for end in of.kl_interval)})"
    x, y = across.at(variant.bits_per_weight or 0.0), up.at(math.log(value))
    return Point(variant, marker, x, y, low, high, text)


def _ends(of: DomainFigures) -> tuple[float, float]:
    """Return the ends of the interval where they can be on a logarithmic axis, else the value itself."""
    value = of.kl_divergence or 0.0
    low, high = of.kl_interval or (value, value)
    return (low, high) if low > 0 and math.isfinite(high) else (value, value)
