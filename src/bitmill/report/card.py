"""The README.md of a quantized folder, written from its report."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, Template, Undefined

from bitmill.report.figures import figures_of
from bitmill.report.parts import ends_said, sizes_said, split_layers
from bitmill.report.words import kv_measured, kv_said, spelled

_MEASURED = """\
| text | windows |{% for f in figures %} {{ f.title }} |{% endfor %} measured by |
|---|---|{% for f in figures %}---|{% endfor %}---|
{% for m in measured -%}
| {{ m.text }}, {{ m.split }} split | {{ m.windows }} x {{ m.seqlen }} |
{%- for f in figures %} {{ number(m[f.key]) }} |{% endfor %} bitmill {{ m.by }}{{ kv_measured(m) }} |
{% endfor %}
"""

_CARD = (
    """\
---
base_model: {{ source }}
base_model_relation: quantized
library_name: transformers
tags:
- bitmill
- {{ recipe.name }}
---

# {{ source }}, quantized by bitmill ({{ recipe.name }}, {{ "%.3f" | format(bits_per_weight) }} bits per weight)

The linear layers of the blocks are stored packed in the format
{{ spelled(recipe.weight) }};
{{ "%.3f" | format(bits_per_weight) }} bits per weight count every scale, zero, index and table on disk.
{{ ends }}
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
Whether the caller's calibration windows contain this text is not known.
{%- elif measured | rejectattr("split", "equalto", "eval") | list -%}
The eval split was held out from calibration; rows of another split include what was calibrated on.
{%- else -%}
The text was held out from calibration.
{%- endif %}


{% else %}
Nothing was measured. Do so with `bitmill eval FOLDER --reference SOURCE --record`.

{% endif %}
{% if worst %}
Layers with the largest relative output error on the calibration text:

| layer | bits per weight | weight error | output error |
|---|---|---|---|
{% for layer in worst -%}
| `{{ layer.name }}` | {{ number(layer.bits_per_weight) }} | {{ number(layer.weight_error) }} |
{{- " " ~ number(layer.output_error) }} |
{% endfor %}

Every layer is listed in `report.json`.

{% endif %}
## Made by

bitmill {{ bitmill }}, recipe in `recipe.yaml`:

```yaml
{{ recipe_yaml }}```

{% if identity.calibration and identity.calibration.source == "tokens" %}
Calibrated on token windows given by the caller (sha256 `{{ identity.calibration.sha256[:16] }}`).
{% elif identity.calibration %}
Calibrated on {{ identity.calibration.samples }} windows of {{ identity.calibration.seqlen }} tokens of
`{{ identity.calibration.source }}` (seed {{ identity.calibration.seed }}, sha256
`{{ identity.calibration.sha256[:16] }}`).
{% else %}
No calibration text was used.
{% endif %}

## Use

```python
import bitmill  # teaches transformers the format
from transformers import {{ auto }}, AutoTokenizer

model = {{ auto }}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
)


_FLOAT_CARD = (
    """\
---
base_model: {{ source }}
library_name: transformers
tags:
- bitmill
---

# {{ source }}, with a packed cache of keys and values

The weights are as in the source. {{ kv_line }}
`bitmill generate FOLDER` and `bitmill chat FOLDER` use it; so does a program that passes
`QuantizedCache(model)` as `past_key_values`.

## Measured

{% if measured %}
"""
    + _MEASURED
    + """\
{% else %}
Nothing was measured. Do so with `bitmill eval FOLDER --kv METHOD --reference SOURCE --record`.
{% endif %}
"""
)


def model_card(report: dict[str, Any]) -> str:
    """Markdown for a report as `quantize` makes it."""
    import yaml

    layers = [layer for layer in split_layers(report)[0] if layer.get("output_error") is not None]
    worst = sorted(layers, key=lambda layer: -layer["output_error"])[:5]
    text = _CARD if report["recipe"] else _FLOAT_CARD
    return _template(text).render(
        **{**report, "ends": ends_said(report), "sizes": sizes_said(report)},
        worst=worst,
        figures=figures_of(report["measured"]),
        auto=report.get("auto_class", "AutoModelForCausalLM"),
        number=_number,
        spelled=spelled,
        kv_line=kv_said(report["kv"]) if report.get("kv") else "",
        kv_measured=kv_measured,
        recipe_yaml=yaml.safe_dump(report["recipe"], sort_keys=False),
    )


@cache
def _template(text: str) -> Template:
    return Environment(autoescape=False, trim_blocks=True, keep_trailing_newline=True).from_string(text)


def _number(value: Any) -> str:
    if value is None or isinstance(value, Undefined):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
