"""Pages match the results, escape them, and load nothing. Their behavior is tested in tests/browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import pytest

from bitmill.recipes.method import build_recipe
from bitmill.report.html import comparison_page, folder_documents, folder_page
from bitmill.report.results import Results
from helpers import sample_results
from helpers.sample_results import COMPARED, EVIL, MEASURED, report


def without_plotly(page: str) -> str:
    """The page less the one script that is not ours."""
    return re.sub(r"<script>/\*.*?plotly\.js.*?</script>", "", page, count=1, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page() -> str:
    return without_plotly(comparison_page(sample_results.results()))


def test_all_variants_shown(page):
    for variant in sample_results.results().variants:
        assert f"{variant.method} {variant.bits}-bit" in page
    for words in (
        "11.62",
        "+3.5\u00a0%",
        "×2.13",
        "6.9×10⁵",
        "hqq cannot be had at 2 bits",
        "A processor",
        "not applicable",
    ):
        assert words in page
    assert "bitmill compare smollm2-135m --methods rtn,gptq" in page


def test_answers_next_to_float(page):
    assert "<p>The capital of France <mark>is</mark> Paris, which is also" in page
    assert "<p>The capital of France <mark>i</mark> one of those" in page
    assert '<span class="verdict">differs at token 5 of 20</span>' in page


def test_answers_of_one_model_alone():
    document = sample_results.document({"rtn": (14.67, None, None)}, blocks=1)
    alone = comparison_page(Results.model_validate({**document, "float": None}))
    assert '<p tabindex="0">The capital of France is Paris' in alone
    assert "<mark" not in alone.partition("<main>")[2].partition("</main>")[0]
    document["variants"] = []
    assert f'<p tabindex="0">{sample_results.ANSWERS[0]}</p>' in comparison_page(Results.model_validate(document))


@pytest.mark.parametrize(
    "make", [lambda: comparison_page(sample_results.results()), lambda: folder_page(report())]
)
def test_content_security_policy(make):
    page = make()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")


@pytest.mark.parametrize(
    "make", [lambda: comparison_page(sample_results.results()), lambda: folder_page(report())]
)
def test_no_external_resources(make):
    page = without_plotly(make())
    assert re.findall(r'(?:src|href|action)="(?!data:|#)', page) == []
    assert re.findall(r"https?://(?!www\.w3\.org/)", page) == []
    assert "@import" not in page
    assert "url(" not in page


def test_results_are_escaped():
    document = sample_results.document({"rtn": (14.67, 33.55, None)}, blocks=1)
    document["settings"] |= {"model": EVIL, "prompts": [EVIL, EVIL]}
    document["machine"]["cpu"] = document["commands"][0] = EVIL
    for variant in document["variants"]:
        variant |= {"name": EVIL + str(variant["bits"]), "method": EVIL, "reason": EVIL}
        for sample in variant.get("samples", []):
            sample |= sample_results.sample(EVIL)
        for layer in variant.get("layers", []):
            layer["name"] = EVIL + layer["name"]
    page = without_plotly(comparison_page(Results.model_validate(document)))
    assert "alert(1)</script>" not in page
    assert "<img src=x" not in page
    assert page.count("<script") == 3  # ours, and the data
    assert html.escape(EVIL, quote=False)[:20] in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["methods"][0]["name"] == EVIL


def test_report_is_escaped():
    layers = [{**layer, "name": EVIL + layer["name"]} for layer in sample_results.layers(0.05, 2, True, 0)]
    recipe = {**build_recipe("gptq").to_dict(), "name": EVIL}
    page = folder_page(report(source=EVIL, recipe=recipe, layers=layers, measured=[{**COMPARED, "text": EVIL}]))
    assert "alert(1)</script>" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize(
    "document",
    [
        sample_results.document({}),
        sample_results.document({"rtn": (None, None, None)}),
        {**sample_results.document({"rtn": (14.67, None, None)}, blocks=1), "float": None},
        sample_results.document({f"method{n}": (12.0 + n, None, None) for n in range(20)}, blocks=1),
    ],
    ids=["no variants", "nothing measured", "no float", "twenty methods"],
)
def test_incomplete_results(document):
    assert "</html>" in comparison_page(Results.model_validate(document))


def test_page_is_deterministic():
    assert comparison_page(sample_results.results()) == comparison_page(sample_results.results())
    assert folder_page(report()) == folder_page(report())


# -- the page of a folder -----------------------------------------------------------------------------------


def test_folder_page():
    page = folder_page(report())
    for words in (
        "smollm2-135m",
        "3.297",
        "12.67",
        "+12.8\u00a0%",
        "0.150",
        "81.4\u00a0%",
        "name: gptq",
        "128 × 512 tokens of pydoc",
    ):
        assert words in page
    assert page.count('title="block ') == 2 * 30 * 7  # outputs and weights
    assert len(page) < 80_000  # each folder holds one


def test_folder_page_without_figures():
    page = folder_page(report(measured=[], identity={"calibration": None}))
    assert "Nothing was measured" in page
    assert "nothing</dd>" in page
    bare = folder_page(report(measured=[MEASURED], layers=sample_results.layers(0.05, 2, False, 0)))
    assert "Errors of the weights in figures" in bare
    assert "Errors of the outputs" not in bare
    assert "KL divergence" not in bare
    assert 'class="heat"' not in folder_page(report(layers=[])).partition("<main>")[2]
    tokens = {"source": "tokens", "sha256": sample_results.HASH}
    assert "token windows passed by the caller" in folder_page(report(identity={"calibration": tokens}))


def test_recorded_answers():
    page = folder_page(report(samples=sample_results.recorded_answers()))
    assert "differs at token 5 of 8" in page
    assert "<mark>is</mark> Paris" in page
    assert "at most 48" in page
    assert "h-answers" not in folder_page(report())


def test_folder_card_and_page():
    documents = folder_documents(report())
    assert set(documents) == {"README.md", "report.html"}
