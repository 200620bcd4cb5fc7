"""Layout and behavior of the pages in a browser. BITMILL_SCREENSHOTS=FOLDER saves screenshots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitmill.report.html import comparison_page, folder_page
from bitmill.report.results import Results
from helpers import sample_results
from helpers.sample_results import EVIL, report

WINDOWS = ("desktop", "phone")


@pytest.fixture(scope="module")
def comparison() -> str:
    return comparison_page(sample_results.results())


@pytest.fixture
def page(visit, comparison):
    return visit(comparison).page


def rows(page) -> list[str]:
    """First cells of the visible rows of the table of figures."""
    return page.eval_on_selector_all(
        "table.sortable tbody tr:not([hidden]) th", "cells => cells.map(c => c.dataset.value)"
    )


def points(page) -> int:
    return page.locator("#quality .scatterlayer .point").count()


def axis(page, which: str = "y") -> str:
    return page.locator(f"#quality .{which}title").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["comparison", "folder"])
def test_page_loads_and_fits(kind, window, scheme, visit, comparison):
    html = comparison if kind == "comparison" else folder_page(report())
    opened = visit(html, window, color_scheme=scheme)
    assert opened.messages == []
    assert [url for url in opened.requests[1:] if not url.startswith(("data:", "blob:"))] == []
    assert opened.overflow() <= 0
    wide = opened.page.evaluate(
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, .chart, pre')"
        " && e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0
    if folder := os.environ.get("BITMILL_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        opened.page.screenshot(path=Path(folder) / f"{kind}-{window}-{scheme}.png", full_page=True)


def test_page_content(page):
    headings = page.locator("main section h2").all_text_contents()
    assert headings == [
        "Quality by size",
        "All figures",
        "Size and cost",
        "Error of every layer",
        "Answers to the prompts",
        "Measurement settings",
    ]
    assert page.locator(".tile").count() == 4
    assert points(page) == 17
    assert page.locator("#layers .heatmaplayer image").count() == 1
    assert page.locator(".cost .row:not(.head)").count() == 18
    assert page.locator(".answers:visible .card").count() == 17
    assert page.locator("#quality .annotation-text", has_text="gptqt").count() == 1  # labels where the lines are


def test_table_sorting(page):
    given = rows(page)
    perplexity = page.get_by_role("columnheader", name="perplexity")
    perplexity.get_by_role("button").click()
    assert perplexity.get_attribute("aria-sort") == "ascending"
    assert rows(page)[:3] == ["float", "gptqt 4-bit", "gptq 4-bit"]
    assert rows(page)[-1] == "hqq 2-bit"  # has none
    perplexity.get_by_role("button").press("Enter")
    assert perplexity.get_attribute("aria-sort") == "descending"
    assert rows(page)[0] == "rtn 2-bit"
    assert rows(page)[-1] == "hqq 2-bit"
    name = page.get_by_role("columnheader", name="variant")
    name.get_by_role("button").press("Space")
    assert perplexity.get_attribute("aria-sort") == "none"
    assert rows(page)[:4] == ["awq 2-bit", "awq 3-bit", "awq 4-bit", "bcq 2-bit"]
    top1 = page.get_by_role("columnheader", name="top-1")
    top1.get_by_role("button").click()
    assert top1.get_attribute("aria-sort") == "descending"  # the best first
    assert rows(page)[:2] == ["float", "gptqt 4-bit"]
    assert sorted(rows(page)) == sorted(given)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_switch(visit, comparison, scheme):
    page = visit(comparison, color_scheme=scheme).page
    background = "getComputedStyle(document.body).backgroundColor"
    colours = f"[{background}, getComputedStyle(document.querySelector('#quality .ytitle')).fill]"
    before = page.evaluate(colours)
    button = page.get_by_role("button", name="Switch between light and dark")
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    button.click()
    page.wait_for_function(f"before => {colours}.every((colour, i) => colour !== before[i])", arg=before)
    after = page.evaluate(colours)
    assert button.get_attribute("aria-pressed") == str(scheme != "dark").lower()
    page.reload()
    assert page.evaluate(background) == after[0]


def test_system_theme(page):
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("before => getComputedStyle(document.body).backgroundColor !== before", arg=before)


def test_method_and_bit_filters(page):
    page.get_by_role("checkbox", name="bcq").uncheck()
    page.get_by_role("checkbox", name="2", exact=True).uncheck()
    assert not [name for name in rows(page) if "bcq" in name or "2-bit" in name]
    assert points(page) == 10
    assert page.locator(".cost .row:visible").count() == 12  # and the head, and float
    assert page.locator(".answers:visible .card:visible").count() == 10
    assert page.locator("#layer-variant option:not([hidden])").count() == 10
    page.get_by_role("button", name="none").click()
    assert rows(page) == ["float"]
    assert points(page) == 0
    assert "every variant is filtered out" in page.locator("#quality-note").text_content()
    page.get_by_role("button", name="all").click()
    page.get_by_role("checkbox", name="2", exact=True).check()
    assert len(rows(page)) == 19
    assert points(page) == 17


def test_metric_and_size_choice(page):
    assert axis(page) == "perplexity (log scale)"
    assert "bits per weight" in axis(page, "x")
    page.get_by_role("radio", name="KL divergence").check()
    page.get_by_role("radio", name="Size on disk").check()
    assert axis(page) == "KL divergence from float, nats a token (log scale)"
    assert axis(page, "x") == "size on disk, MB"
    page.get_by_role("radio", name="Top-1").check()
    assert axis(page) == "top-1 agreement with float"
    assert "Higher is better" in page.locator("#quality-note").text_content()


def test_axis_ignores_outliers(page):
    low, high = page.evaluate("document.getElementById('quality')._fullLayout.yaxis.range")
    assert 10**low < sample_results.FLOAT < 10**high < 300  # though one has 689134
    note = page.locator("#quality-note").text_content()
    assert "rtn 2-bit (6.9×10⁵)" in note
    assert "bcq 3-bit (694)" in note
    heights = page.eval_on_selector_all(
        "#quality .scatterlayer .point", "all => all.map(p => p.getBoundingClientRect().top)"
    )
    assert max(heights) - min(heights) > 300


def test_narrow_range_is_linear(visit):
    grid = {"rtn": (12.0, 12.5, None), "gptq": (11.5, 11.9, None)}
    page = visit(comparison_page(Results.model_validate(sample_results.document(grid, blocks=2)))).page
    assert axis(page) == "perplexity"
    assert "off the scale" not in page.locator("#quality-note").text_content()


def test_pareto_front(page):
    """Sizes and perplexities are such that bcq and rtn are beaten at every size."""
    sizes = page.evaluate(
        "Object.fromEntries(document.getElementById('quality').data.filter(t => t.mode === 'markers')"
        ".map(t => [t.name, t.marker.size.filter(s => s > 12).length]))"
    )
    assert sizes == {"rtn": 0, "gptq": 3, "gptqt": 3, "bcq": 0, "awq": 1, "hqq": 0}


def test_layer_chart(page):
    note = page.locator("#layers-note")
    outputs, weights = page.get_by_role("radio", name="Outputs"), page.get_by_role("radio", name="Weights")
    first = note.text_content()
    assert "gptqt 4-bit" in first
    page.locator("#layer-variant").select_option("rtn-3bit")
    assert "output errors were not measured" in note.text_content()
    assert weights.is_checked()
    assert outputs.is_disabled()
    page.locator("#layer-variant").select_option("gptqt-4bit")
    assert outputs.is_checked()  # what was chosen comes back
    assert note.text_content() == first
    weights.check()
    assert note.text_content() != first


def test_error_maps(page):
    shown = page.locator("[data-variant]:visible")
    assert shown.count() == 12  # rtn and hqq have no errors of outputs
    first = shown.nth(1)
    idle = first.locator("output").text_content()
    cell = first.locator(".heat i").first
    cell.hover()
    assert first.locator("output").text_content() == cell.get_attribute("title") != idle
    page.mouse.move(0, 0)
    assert first.locator("output").text_content() == idle
    first.get_by_role("button").click()
    assert page.locator("#layer-variant").input_value() == first.get_attribute("data-variant")
    page.get_by_role("radio", name="Weights").check()
    assert page.locator("[data-variant]:visible").count() == 17
    assert page.locator(".chosen:visible").count() == 1


def test_error_maps_on_a_phone(visit, comparison):
    """A tap shows the figure, also after the finger is lifted."""
    page = visit(comparison, "phone").page
    cell = page.locator("[data-variant]:visible .heat i").nth(40)
    cell.tap()
    assert page.locator("[data-variant] output").first.text_content() == cell.get_attribute("title")


def test_prompt_tabs(page):
    assert page.locator(".answers:visible").count() == 1
    assert "Paris" in page.locator(".answers:visible .card").first.text_content()
    page.get_by_role("radio", name=sample_results.PROMPTS[1]).check()
    assert page.locator(".answers:visible").count() == 1
    assert "scatters" in page.locator(".answers:visible .card").first.text_content()


def test_no_javascript(visit, comparison):
    page = visit(comparison, java_script_enabled=False).page
    assert page.locator("table.sortable tbody tr:visible").count() == 19
    assert page.locator(".answers:visible").count() == 2
    assert page.locator("form:visible").count() == 0
    assert page.get_by_text("The charts need JavaScript").is_visible()


def test_no_script_injection(visit):
    document = sample_results.document({"rtn": (14.67, 33.55, None), "gptq": (11.79, 14.03, None)}, blocks=2)
    document["settings"] |= {"model": EVIL, "prompts": [EVIL, EVIL]}
    for number, variant in enumerate(document["variants"]):
        variant |= {"name": f"{EVIL}{number}", "method": EVIL + variant["method"], "reason": EVIL}
        for sample in variant.get("samples", []):
            sample |= sample_results.sample(EVIL)
        for layer in variant.get("layers", []):
            layer["name"] = f"{EVIL}{layer['name']}"
    opened = visit(comparison_page(Results.model_validate(document)))
    opened.page.locator("#quality .scatterlayer .point").first.hover(force=True)
    opened.page.mouse.move(*[opened.page.locator("#layers .nsewdrag").bounding_box()[k] + 30 for k in ("x", "y")])
    assert opened.messages == []
    assert opened.page.locator("main img").count() == 0
    assert opened.page.locator("h1").text_content() == EVIL


def test_many_methods(visit):
    grid = {f"method-number-{n}": (12.0 + n, 15.0 + 2 * n, 40.0 * (n + 1)) for n in range(20)}
    html = comparison_page(Results.model_validate(sample_results.document(grid, blocks=3)))
    for window in WINDOWS:
        opened = visit(html, window)
        assert opened.messages == []
        assert opened.overflow() <= 0


def test_folder_table_sorting(visit):
    page = visit(folder_page(report())).page
    worst = page.get_by_role("region", name="The worst layers")
    worst.get_by_role("columnheader", name="weight error").get_by_role("button").click()
    cells = "rows => rows.map(r => Number(r.cells[2].dataset.value))"
    values = worst.locator("tbody tr").evaluate_all(cells)
    assert len(values) == 8
    assert values == sorted(values)
