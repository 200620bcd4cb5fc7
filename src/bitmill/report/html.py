"""Pages about results: one file each, which loads nothing from anywhere.

The page of a comparison carries plotly (4.8 MB), for its charts are explored: switched, filtered, zoomed. The
page in every quantized folder says what one report.json says and draws it as plain HTML and SVG in some tens of
kilobytes: nobody wants a script of megabytes in each folder.

Everything that comes from results is escaped, by the templates or, in the data for the scripts, by `tojson`. A
content security policy lists the digests of the page's own scripts, so that no other would run, and forbids
every request.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bitmill.report import numbers, view
from bitmill.report.card import model_card
from bitmill.report.figures import figures_of, own_figure
from bitmill.report.heat import STEPS, heat_map
from bitmill.report.palette import DARK, LIGHT, SHAPES, mark_of
from bitmill.report.parts import bytes_inside, ends_said, sizes, split_layers
from bitmill.report.results import Layer, Results
from bitmill.report.words import kv_measured, kv_said


def comparison_page(results: Results) -> str:
    """The page of `bitmill compare`, from its results alone."""
    methods = view.methods_of(results)
    return _render(
        "comparison.html",
        scripts=["page.js", "plotly", "charts.js"],
        results=results,
        settings=results.settings,
        reference=results.float,
        headline=view.headline(results),
        variants=view.in_order(results),
        best=view.best_of_bits(results),
        methods=methods,
        marks={name: mark_of(index) for index, name in enumerate(methods)},
        bits=sorted({v.bits for v in results.variants if v.bits is not None}, reverse=True),
        label=view.label,
        same_start=view.same_start,
        data=view.chart_data(results),
    )


def folder_page(report: dict[str, Any]) -> str:
    """The page of one quantized folder, from its report: a function of it alone, like everything in the folder."""
    import yaml

    inside, _ = split_layers(report)
    layers = [Layer.model_validate({key: layer.get(key) for key in Layer.model_fields}) for layer in inside]
    error = "output_error" if any(layer.output_error is not None for layer in layers) else "weight_error"
    worst = sorted((v for v in layers if getattr(v, error) is not None), key=lambda v: -getattr(v, error))
    measured = [m for m in report["measured"] if own_figure(m)]
    return _render(
        "folder.html",
        scripts=["page.js"],
        report=report,
        calibration=report["identity"].get("calibration"),
        measured=measured,
        figures=figures_of(measured),
        latest=measured[-1] if measured else None,
        layers=layers,
        ends=ends_said(report),
        kv=kv_said(report["kv"]) if report.get("kv") else "",
        kv_measured=kv_measured,
        sizes=sizes(report),
        inside=bytes_inside(report),
        error=error,
        worst=worst[:8],
        steps=STEPS,
        heat=heat_map(layers, error),
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False),
    )


def folder_documents(report: dict[str, Any]) -> dict[str, str]:
    """The files of a quantized folder that say what its report says: name -> text."""
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
            palette=list(zip(LIGHT, DARK, strict=True)),
            shapes=SHAPES,
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
        "number": numbers.number,
        "size": numbers.size,
        "duration": numbers.duration,
        "percent": numbers.percent,
        "change": numbers.change,
        "plural": numbers.plural,
    }
    return environment


@cache
def _file(name: str) -> Markup:
    """A file of ours, which needs no escaping."""
    return Markup((resources.files("bitmill.report") / "templates" / name).read_text(encoding="utf-8"))


@cache
def _script(name: str) -> Markup:
    """The text of a script, as an HTML parser hands it on."""
    if name != "plotly":
        return _file(name)
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("\r\n", "\n"))


@cache
def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
