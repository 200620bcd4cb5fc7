"""Tables and charts of figures by domain."""

from __future__ import annotations

import re

import pytest

from bitmill.data.domain import SUITE
from bitmill.report.card import model_card
from bitmill.report.charts import Marker
from bitmill.report.comparison import results_table
from bitmill.report.domain_charts import domain_bars, domain_panels
from bitmill.report.domains import domain_table, latest_with_domains, worst_domain
from bitmill.report.html import comparison_page, folder_page
from bitmill.report.results import Results
from bitmill.report.text import describe_measurement
from helpers import sample_results


def results() -> Results:
    return Results.model_validate(sample_results.by_domain())


def measured(**changes) -> dict:
    return {**sample_results.measured_by_domain(), **changes}


def test_table():
    table = domain_table(measured())
    assert table.columns[:4] == ["domain", "windows", "perplexity", "float"]
    assert table.columns[table.columns.index("KL, nats") + 1] == "95 % interval"
    assert [row[0] for row in table.rows] == [*SUITE, "mean"]
    assert table.rows[-1][1] == "40"
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert domain_table(sample_results.COMPARED) is None


def test_table_without_a_reference():
    domains = {name: {"windows": 2, "perplexity": 9.5, "tokens": 64} for name in SUITE}
    table = domain_table({"perplexity": 9.5, "domains": domains})
    assert table.columns == ["domain", "windows", "perplexity"]
    assert worst_domain({"domains": domains}) is None


def test_an_ordinary_cache_comes_first():
    packed = measured(kv_method="kivi")
    assert latest_with_domains([measured(by="quantize"), packed])["by"] == "quantize"
    assert latest_with_domains([measured(domains={"prose": 3})]) is None  # windows alone


def test_card_and_page_show_all_domains():
    report = sample_results.report(measured=[sample_results.COMPARED, measured()])
    card, page = model_card(report), folder_page(report)
    for name in (*SUITE, "mean"):
        assert re.search(rf"^\| {name} \| \d+ \|", card, re.MULTILINE)
        assert f'<th scope="row">{name}</th>' in page
    assert page.count('<svg class="domains"') == 4
    assert "\n\n\n" not in card
    assert "By domain" not in model_card(sample_results.report())


def test_bars_are_in_proportion():
    panel = domain_bars(measured())[1]
    assert panel.title.startswith("KL divergence")
    shown = {bar.name: bar for bar in panel.bars}
    values = {name: of["kl_divergence"] for name, of in measured()["domains"].items()}
    for name, bar in shown.items():
        assert bar.length / shown["code"].length == pytest.approx(values[name] / values["code"], rel=0.02)
        assert bar.whisker[0] < bar.length < bar.whisker[1]
    assert domain_bars(None) == domain_bars(sample_results.COMPARED) == []


def test_panels_of_a_comparison():
    found = results()
    markers = {variant.method: Marker(0, 0) for variant in found.variants}
    panels = domain_panels(found, markers)
    assert [panel.name for panel in panels] == list(SUITE)
    assert {(tuple(panel.x_ticks), tuple(panel.y_ticks)) for panel in panels} == {
        (tuple(panels[0].x_ticks), tuple(panels[0].y_ticks))
    }
    for panel in panels:
        assert len(panel.points) == len(found.done())
        by_divergence = sorted(panel.points, key=lambda p: p.variant.domains[panel.name].kl_divergence)
        assert [p.y for p in by_divergence] == sorted((p.y for p in panel.points), reverse=True)
        assert all(0 < p.high <= p.y <= p.low < panel.bottom for p in panel.points)
    assert domain_panels(sample_results.results(), markers) == []


def test_comparison_page_and_table():
    page = comparison_page(results())
    for name in SUITE:
        assert f"<figcaption>{name}</figcaption>" in page
    assert "worst domain" in page
    assert "worst domain" in [column.header for column in results_table(results()).columns]
    without = sample_results.results()
    assert "worst domain" not in comparison_page(without)
    assert "worst domain" not in [column.header for column in results_table(without).columns]


def test_a_line_names_the_worst_domain():
    assert "largest KL divergence" in describe_measurement(measured())
    assert f"in {worst_domain(measured())}" in describe_measurement(measured())
