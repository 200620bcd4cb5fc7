"""HTML pages about results, each a single file that makes no requests.

The page of a comparison contains plotly (4.8 MB), because its charts can be switched, filtered and zoomed. The
page in every quantized folder renders one report.json as plain HTML and SVG in some tens of kilobytes.

Everything from results is escaped, by the templates or, in the data for the scripts, by `tojson`. A content
security policy lists the digests of the page's own scripts, so that no other script runs, and forbids every
request.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bitmill.report import charts, comparison, formatting
from bitmill.report.budget import budget_sentence, budget_text
from bitmill.report.card import model_card
from bitmill.report.describe import (
    block_layer_bytes,
    describe_embedding_and_head,
    describe_exceptions,
    describe_kv_cache,
    describe_measured_cache,
    describe_running,
    describe_training,
    describe_windows,
    part_sizes,
    split_layers,
)
from bitmill.report.domain_charts import domain_bars, domain_panels
from bitmill.report.domains import domain_table, latest_with_domains, worst_domain
from bitmill.report.heat import COLOUR_STEPS, error_maps
from bitmill.report.metrics import metric_columns, primary_metric
from bitmill.report.pictures import PictureResults, picture_order, picture_rows
from bitmill.report.results import Layer, Results
from bitmill.report.samples import AnswerPair, pair_answers, recorded_pairs
from bitmill.report.tasks import NOTE, task_table

_WORST_LAYERS = 8  # listed on the page of a folder


def comparison_page(results: Results) -> str:
    """Return the page of `bitmill compare`, from its results alone."""
    methods = comparison.methods_of(results)
    markers = {name: charts.marker_of(index) for index, name in enumerate(methods)}
    return _render(
        "comparison.html",
        scripts=["page.js", "plotly", "charts.js"],
        results=results,
        settings=results.settings,
        reference=results.float,
        headline=comparison.headline(results),
        variants=comparison.in_order(results),
        best=comparison.best_of_bits(results),
        methods=methods,
        markers=markers,
        domain_panels=domain_panels(results, markers),
        worst_domains={v.name: worst_domain(v.model_dump(include={"domains"})) for v in results.variants},
        bits=sorted({v.bits for v in results.variants if v.bits is not None}, reverse=True),
        label=comparison.label,
        by_task=comparison.results_by_task(results),
        task_note=NOTE,
        answers=_answers(results),
        error_maps=error_maps({v.name: v.layers for v in comparison.in_order(results)}),
        data=charts.chart_data(results),
    )


def picture_page(results: PictureResults) -> str:
    """Return the page of `bitmill compare` for a vision model, from its results alone."""
    return _render(
        "pictures.html",
        scripts=["page.js"],
        results=results,
        table=picture_rows(results),
        variants=picture_order(results),
    )


def _answers(results: Results) -> dict[str, list[AnswerPair]]:
    """Return the answers of every variant next to those of the float model, by name."""
    reference = results.float.samples if results.float else []
    return {variant.name: pair_answers(reference, variant.samples) for variant in results.variants}


def folder_page(report: dict[str, Any]) -> str:
    """Return the page of one quantized folder, a function of its report alone."""
    import yaml

    block_layers, _ = split_layers(report)
    layers = [Layer.model_validate({key: layer.get(key) for key in Layer.model_fields}) for layer in block_layers]
    maps = error_maps({"": layers})
    error = maps[0].error if maps else "weight_error"
    worst = sorted((v for v in layers if getattr(v, error) is not None), key=lambda v: -getattr(v, error))
    measured = [m for m in report["measured"] if primary_metric(m)]
    by_domain = latest_with_domains(measured)
    return _render(
        "folder.html",
        scripts=["page.js"],
        report=report,
        calibration=report["identity"].get("calibration"),
        measured=measured,
        columns=metric_columns(measured),
        by_domain=by_domain,
        domains=domain_table(by_domain) if by_domain else None,
        domain_bars=domain_bars(by_domain),
        describe_windows=describe_windows,
        latest=measured[-1] if measured else None,
        tasks=task_table(report["tasks"]) if report.get("tasks") else [],
        task_note=NOTE,
        answers=recorded_pairs(report),
        layers=layers,
        exceptions=describe_exceptions(report["recipe"]),
        embedding_and_head=describe_embedding_and_head(report),
        kv=describe_kv_cache(report["kv"]) if report.get("kv") else "",
        describe_measured_cache=describe_measured_cache,
        budget=budget_sentence(report["budget"]) if report.get("budget") else "",
        budget_text=budget_text(report["budget"]) if report.get("budget") else "",
        training=describe_training(report["trained"]) if report.get("trained") else "",
        running=describe_running(report["running"]) if report.get("running") else "",
        sizes=part_sizes(report),
        block_layer_bytes=block_layer_bytes(report),
        worst=worst[:_WORST_LAYERS],
        error_maps=maps,
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False),
    )


def folder_documents(report: dict[str, Any]) -> dict[str, str]:
    """Return the readable files of a quantized folder, rendered from its report: name -> text."""
    page = {"report.html": folder_page(report)} if report["recipe"] else {}
    return {"README.md": model_card(report), **page}


def _render(template: str, *, scripts: list[str], **values: Any) -> str:
    code = {name: _script(name) for name in scripts}
    return (
        _environment()
        .get_template(template)
        .render(
            **values,
            scripts=code,
            digests=[_digest(script) for script in code.values()],
            css=_file("page.css"),
            icon=base64.b64encode(_file("icon.svg").encode()).decode(),
            palette=list(zip(charts.LIGHT, charts.DARK, strict=True)),
            shapes=charts.SHAPES,
            steps=COLOUR_STEPS,
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bitmill.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": formatting.number,
        "size": formatting.size,
        "duration": formatting.duration,
        "percent": formatting.percent,
        "change": formatting.change,
        "plural": formatting.plural,
    }
    return environment


@cache
def _file(name: str) -> Markup:
    """Return a file of the package, which needs no escaping."""
    return Markup((resources.files("bitmill.report") / "templates" / name).read_text(encoding="utf-8"))


@cache
def _script(name: str) -> Markup:
    """Return the text of a script with the line ends that an HTML parser produces, as its digest requires."""
    if name != "plotly":
        return _file(name)
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("\r\n", "\n"))


@cache
def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
