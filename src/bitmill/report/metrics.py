"""The metrics of a measurement: keys, names, units and how they are displayed.

A measurement, as `quantize` and `evaluate` return it, has the metrics of a language model, an encoder or a
classifier.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bitmill.report import formatting

Measurement = dict[str, Any]


@dataclass(frozen=True)
class MetricColumn:
    """One metric as a column of a table.

    Attributes:
        key: key in the measurement.
        name: full name.
        short: name over a narrow column; the full name where it is empty.
        unit: unit of the value.
        note: explanation; a metric with a note has a tile on the page.
        against: key of the float model's value.
        digits: significant digits on pages.
        share: the value is a share, displayed as a percentage.
        interval: key of the two ends of its interval, which follow the value.
        optional: the column is left out where no measurement has the value.
    """

    key: str
    name: str
    short: str = ""
    unit: str = ""
    note: str = ""
    against: str = ""
    digits: int = 4
    share: bool = False
    interval: str = ""
    optional: bool = False

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def column(self) -> str:
        """The short name, or the full one where there is none."""
        return self.short or self.name

    def display(self, measurement: Measurement) -> str:
        """Format the value in a measurement for a page; a dash where it is missing."""
        value = measurement.get(self.key)
        return formatting.percent(value) if self.share else formatting.number(value, self.digits)

    def display_interval(self, measurement: Measurement) -> str:
        """Format the interval of the value for a page; empty where there is none."""
        ends = measurement.get(self.interval) if self.interval else None
        return " to ".join(formatting.number(end, self.digits) for end in ends) if ends else ""


LANGUAGE_METRICS = (
    MetricColumn("perplexity", "perplexity", note="of the quantized model", against="reference_perplexity"),
    MetricColumn("reference_perplexity", "float"),
    MetricColumn("perplexity_ratio", "ratio to float", "ratio", optional=True),
    MetricColumn(
        "kl_divergence",
        "KL divergence",
        "KL, nats",
        "nats",
        "nats per token from float",
        digits=3,
        interval="kl_interval",
    ),
    MetricColumn("kl_p99", "KL, 99 % quantile", "KL 99 %", "nats", digits=3, optional=True),
    MetricColumn("kl_p999", "KL, 99.9 % quantile", "KL 99.9 %", "nats", digits=3, optional=True),
    MetricColumn("top1_agreement", "top-1 agreement", "top-1", note="most likely token is float's", share=True),
)
EMBEDDING_METRICS = (
    MetricColumn("cosine_similarity", "cosine to float", "cosine", note="between a sentence's two embeddings"),
    MetricColumn("neighbour_agreement", "same neighbour", note="nearest sentence is float's", share=True),
    MetricColumn("pair_cosine", "cosine of two sentences", "two sentences"),
    MetricColumn("reference_pair_cosine", "float's", "float"),
    MetricColumn("sentences", "sentences", optional=True),
    MetricColumn(
        "knn_accuracy",
        "nearest neighbours' label",
        "k-NN",
        note="10 nearest others by vote",
        against="reference_knn_accuracy",
        share=True,
        optional=True,
    ),
    MetricColumn("reference_knn_accuracy", "float's", "float k-NN", share=True, optional=True),
    MetricColumn("knn_change", "k-NN less float's", interval="knn_change_interval", digits=3, optional=True),
    MetricColumn("top1_accuracy", "top-1 accuracy", "top-1", share=True, optional=True),
    MetricColumn("pictures", "pictures", optional=True),
)
CLASS_METRICS = (
    MetricColumn("top1_agreement", "top-1 agreement", "agreement", note="class is float's", share=True),
    MetricColumn("kl_divergence", "KL divergence", "KL, nats", "nats", "nats from float", digits=3),
    MetricColumn(
        "top1_accuracy",
        "top-1 accuracy",
        "top-1",
        note="class is the label",
        against="reference_top1_accuracy",
        share=True,
        optional=True,
    ),
    MetricColumn("reference_top1_accuracy", "float's", "float top-1", share=True, optional=True),
    MetricColumn(
        "accuracy_change", "accuracy less float's", interval="accuracy_change_interval", digits=3, optional=True
    ),
    MetricColumn("confidence", "probability of the class", "confidence"),
    MetricColumn("reference_confidence", "float's", "float"),
    MetricColumn("classes", "classes"),
    MetricColumn("texts", "texts"),
)
REFERENCE_FREE = ("perplexity", "pair_cosine", "confidence")  # keys of metrics that need no reference model


def metric_columns(measured: Iterable[Measurement]) -> tuple[MetricColumn, ...]:
    """Return the columns for these measurements, of a language model where nothing was measured."""
    measured = list(measured)
    kinds = {"pair_cosine": EMBEDDING_METRICS, "confidence": CLASS_METRICS}
    has = [kind for kind in kinds if any(m.get(kind) is not None for m in measured)]
    columns = kinds[has[0]] if has else LANGUAGE_METRICS
    return tuple(c for c in columns if not c.optional or any(m.get(c.key) is not None for m in measured))


def primary_metric(measurement: Measurement) -> str | None:
    """Return the key of the metric that needs no reference; None where nothing was measured."""
    return next((key for key in REFERENCE_FREE if measurement.get(key) is not None), None)
