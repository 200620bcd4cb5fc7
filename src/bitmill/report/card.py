"""The model card (README.md) of a quantized folder, written from its report."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, Template, Undefined

from bitmill.report.budget import budget_sentence
from bitmill.report.describe import (
    describe_attention,
    describe_embedding_and_head,
    describe_exceptions,
    describe_format,
    describe_inputs,
    describe_kv_cache,
    describe_measured_cache,
    describe_running,
    describe_sizes,
    describe_source_types,
    describe_training,
    describe_windows,
    split_layers,
    unit_of,
)
from bitmill.report.domains import domain_table, latest_with_domains
from bitmill.report.escape import code_block, code_span, markdown_text
from bitmill.report.experts import expert_coverage
from bitmill.report.metrics import MetricColumn, metric_columns
from bitmill.report.samples import MarkedText, recorded_pairs
from bitmill.report.tasks import NOTE, task_table

CAUSAL_LM = "AutoModelForCausalLM"
_WORST_LAYERS = 5  # listed
_STATED = ("license", "license_name", "license_link", "language")  # repeated from the float model's card
_PIPELINES = {CAUSAL_LM: "text-generation", "AutoModel": "feature-extraction"}  # by class of transformers

_MEASURED = """\
| text | windows |{% for column in columns %} {{ column.title }} |{% endfor %} measured by |
|---|---|{% for column in columns %}---|{% endfor %}---|
{% for m in measured -%}
| {{ text(m.text) }}, {{ text(m.split) }} split | {{ amount(m) }} |
{%- for column in columns %} {{ number(m[column.key]) }}{{ interval_of(column, m) }} |{% endfor %}
{{- " bitmill " }}{{ text(m.by ~ cache_of(m)) }} |
{% endfor %}
{% if domains %}

By domain, {{ by_domain }}:

|{% for column in domains.columns %} {{ text(column) }} |{% endfor %}

|{% for column in domains.columns %}---|{% endfor %}

{% for row in domains.rows -%}
|{% for cell in row %} {{ text(cell) }} |{% endfor %}

{% endfor %}
{% endif %}
"""

_TASKS = """\
{% if tasks %}
## Tasks

{% for row in task_table(tasks) -%}
| {{ row | map("text") | join(" | ") }} |
{% if loop.first %}
{{ "|---" * row | length }}|
{% endif %}
{% endfor %}

{{ task_note }}

{% endif %}
"""

_ANSWERS = """\
{% if answers %}
## Answers

| prompt | float | quantized | first difference |
|---|---|---|---|
{% for entry, pair in answers -%}
| {{ text(entry.prompt) }} | {{ marked(pair.reference) }} | {{ marked(pair.answer) }} | {{ text(pair.verdict) }} |
{% endfor %}

Greedy decoding. The first token that differs from the float model's answer is bold; after it both go on
on their own.

{% endif %}
"""

_CARD = (
    """\
---
{{ front_matter }}---

# {{ text(source) }}, quantized by bitmill ({{ text(recipe.name) }},
{{- " %.3f" | format(bits_per_weight) }} bits per weight)

The linear layers of the blocks are stored packed in the format
{{ text(describe_format(recipe.weight)) }};
{{ "%.3f" | format(bits_per_weight) }} bits per weight count every scale, zero, index and table on disk.
{%- if recipe.inputs %}
Their inputs are rounded to {{ text(describe_inputs(recipe.inputs)) }}.
{%- endif %}
{%- if recipe.attention %}
Attention multiplies {{ text(describe_attention(recipe.attention)) }}.
{%- endif %}
{% if exceptions %}
{{ exceptions }}
{% endif %}
{{ embedding_and_head }}
{% if source_line %}
{{ source_line }}
{% endif %}
{% if training_line %}
{{ training_line }}
{% endif %}
{% if budget_line %}
{{ budget_line }}
{% endif %}
{% if kv_line %}
{{ kv_line }}
{% endif %}
{% if sizes %}
{{ sizes }}
{% endif %}

## Measured

{% if measured %}
"""
    + _MEASURED
    + """\

{% if identity.calibration and identity.calibration.source == "tokens" -%}
The calibration windows were passed by the caller and may contain this text.
{%- elif measured | rejectattr("split", "equalto", "eval") | list -%}
The eval split was held out from calibration; rows of another split include calibration text.
{%- else -%}
The text was held out from calibration.
{%- endif %}

{% if running_line %}
The packed model as it runs, against float: {{ running_line }}.
`bitmill verify` repeats this without the float model.

{% endif %}

{% else %}
Nothing was measured. Measure with `bitmill eval FOLDER --reference SOURCE --record`.

{% endif %}
"""
    + _TASKS
    + _ANSWERS
    + """\
{% if worst %}
Layers with the largest relative output error on the calibration text:

| layer | bits per weight | weight error | output error |
|---|---|---|---|
{% for layer in worst -%}
| {{ code(layer.name, true) }} | {{ number(layer.bits_per_weight) }} | {{ number(layer.weight_error) }} |
{{- " " ~ number(layer.output_error) }} |
{% endfor %}

{% endif %}
{% if experts %}
Calibration tokens that were sent to the experts of each tensor; experts without any were rounded with the average
of their layer:

| tensor | experts | fewest tokens | median | experts without |
|---|---|---|---|---|
{% for row in experts -%}
| {{ code(row.name, true) }} | {{ row.experts }} | {{ row.least }} | {{ row.median }} | {{ row.without }} |
{% endfor %}

{% endif %}
## Made by

bitmill {{ bitmill }}, recipe in `recipe.yaml`; `report.html` shows the errors of all layers:

{{ recipe_block }}

{% if identity.calibration and identity.calibration.source in ("tokens", "pictures", "recordings") %}
Calibrated on {{ identity.calibration.source | replace("tokens", "token windows") }} passed by the caller
(sha256 `{{ identity.calibration.sha256[:16] }}`).
{% elif identity.calibration %}
Calibrated on {{ calibrated_on(identity.calibration) }} of
{{ code(identity.calibration.source) }} (seed {{ identity.calibration.seed }}, sha256
`{{ identity.calibration.sha256[:16] }}`).
{% else %}
No calibration text was used.
{% endif %}

## Use

{% if auto == causal_lm %}
```sh
bitmill generate FOLDER --prompt "Once upon a time"
bitmill verify FOLDER
```

{% endif %}
```python
import bitmill  # registers the format with transformers
from transformers import {{ auto }}, AutoTokenizer

model = {{ auto }}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
)


_FLOAT_CARD = (
    """\
---
{{ front_matter }}---

# {{ text(source) }}, with a packed cache of keys and values

The weights are as in the source. {{ kv_line }}
`bitmill generate FOLDER` and `bitmill chat FOLDER` use it, and so does a program that passes
`QuantizedCache(model)` as `past_key_values`.

## Measured

{% if measured %}
"""
    + _MEASURED
    + """\
{% else %}
Nothing was measured. Measure with `bitmill eval FOLDER --kv METHOD --reference SOURCE --record`.
{% endif %}
{% if tasks %}

{% endif %}
"""
    + _TASKS
)


def model_card(report: dict[str, Any]) -> str:
    """Return the card in Markdown, from a report as `quantize` returns it."""
    import yaml

    layers = [layer for layer in split_layers(report)[0] if layer.get("output_error") is not None]
    worst = sorted(layers, key=lambda layer: -layer["output_error"])[:_WORST_LAYERS]
    described = describe_source_types(report.get("source_types", []))
    source_line = f"The source {described}" if described else ""
    if imported := report.get("imported"):
        source_line = f"The codes were imported from a checkpoint of {imported}, without quantizing again."
    text = _CARD if report["recipe"] else _FLOAT_CARD
    by_domain = latest_with_domains(report["measured"])
    return _template(text).render(
        **report,
        worst=worst,
        experts=expert_coverage(layers),
        columns=metric_columns(report["measured"]),
        domains=domain_table(by_domain) if by_domain else None,
        by_domain=markdown_text(describe_windows(by_domain)) if by_domain else "",
        interval_of=_interval,
        amount=_amount,
        calibrated_on=_calibrated_on,
        auto=report.get("auto_class", CAUSAL_LM),
        causal_lm=CAUSAL_LM,
        number=_number,
        text=lambda value: markdown_text(str(value)),
        code=lambda value, in_table=False: code_span(str(value), in_table),
        front_matter=_front_matter(report),
        describe_format=describe_format,
        describe_attention=describe_attention,
        describe_inputs=describe_inputs,
        task_table=task_table,
        task_note=NOTE,
        answers=recorded_pairs(report),
        marked=_marked,
        exceptions=describe_exceptions(report["recipe"] or {}, code_span),
        cache_of=describe_measured_cache,
        embedding_and_head=markdown_text(describe_embedding_and_head(report)),
        sizes=describe_sizes(report),
        source_line=markdown_text(source_line),
        running_line=markdown_text(describe_running(report["running"])) if report.get("running") else "",
        kv_line=markdown_text(describe_kv_cache(report["kv"])) if report.get("kv") else "",
        budget_line=markdown_text(budget_sentence(report["budget"])) if report.get("budget") else "",
        training_line=markdown_text(describe_training(report["trained"])) if report.get("trained") else "",
        recipe_block=code_block(yaml.safe_dump(report["recipe"], sort_keys=False), "yaml"),
    )


def _marked(answer: MarkedText) -> str:
    """Return an answer in a cell of a table, with the first differing token in bold."""
    bold = f"<b>{markdown_text(answer.marked)}</b>" if answer.marked else ""
    after = " <i>end of text</i>" if answer.ended else "…" if answer.cut else ""
    return _breaks(answer.common) + bold + _breaks(answer.rest) + after


def _breaks(text: str) -> str:
    """Return Markdown of a text in a cell of a table, whose lines need tags."""
    return "<br>".join(markdown_text(line) for line in text.split("\n"))


def _calibrated_on(calibration: dict[str, Any]) -> str:
    """Return how much a calibration read, in pictures and the like or in windows of tokens."""
    if unit := unit_of(calibration):
        return f"{calibration['samples']} {unit}"
    return f"{calibration.get('samples')} windows of {calibration.get('seqlen')} tokens"


def _amount(measured: dict[str, Any]) -> str:
    """Return the windows of a measurement, with their length where they are rows of tokens."""
    windows = str(measured.get("windows", ""))
    return windows if unit_of(measured) else f"{windows} x {measured.get('seqlen', '')}"


def _interval(column: MetricColumn, measured: dict[str, Any]) -> str:
    """Return the interval of a metric, to follow its value; empty where there is none."""
    interval = column.display_interval(measured)
    return f" ({interval})" if interval else ""


def _front_matter(report: dict[str, Any]) -> str:
    """Return the lines between the two rules at the top of the card, which the Hub reads as YAML."""
    import yaml

    recipe, published = report["recipe"], report.get("published") or {}
    hub_id = (report.get("hub") or {}).get("id") or published.get("id")
    stated = {key: published[key] for key in _STATED if key in published}
    task = _PIPELINES.get(report.get("auto_class", CAUSAL_LM))
    if task != _PIPELINES[CAUSAL_LM]:  # of a model of images and text the language model alone is quantized
        task = published.get("pipeline_tag", task)
    data = {
        "base_model": str(hub_id or report["source"]),
        **({"base_model_relation": "quantized"} if recipe else {}),
        **stated,
        "library_name": "transformers",
        **({"pipeline_tag": task} if task else {}),
        "tags": ["bitmill", *([str(recipe["name"])] if recipe else [])],
    }
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000))


@cache
def _template(text: str) -> Template:
    environment = Environment(autoescape=False, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["text"] = lambda value: markdown_text(str(value))
    return environment.from_string(text)


def _number(value: Any) -> str:
    if value is None or isinstance(value, Undefined):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
