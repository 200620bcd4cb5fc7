"""The metrics of a measurement: keys, names, units and how they are displayed.

A measurement, as `quantize` and `evaluate` return it, has the metrics of a language model or those of an encoder.
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
    """

    key: str
    name: str
    short: str = ""
    unit: str = ""
    note: str = ""
    against: str = ""
    digits: int = 4
    share: bool = False

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


LANGUAGE_METRICS = (
    MetricColumn("perplexity", "perplexity", note="of the quantized model", against="reference_perplexity"),
    MetricColumn("reference_perplexity", "float"),
    MetricColumn("kl_divergence", "KL divergence", "KL, nats", "nats", note="nats per token from float", digits=3),
    MetricColumn("top1_agreement", "top-1 agreement", "top-1", note="most likely token is float's", share=True),
)
EMBEDDING_METRICS = (
    MetricColumn("cosine_similarity", "cosine to float", "cosine", note="between a sentence's two embeddings"),
    MetricColumn("neighbour_agreement", "same neighbour", note="nearest sentence is float's", share=True),
    MetricColumn("pair_cosine", "cosine of two sentences", "two sentences"),
    MetricColumn("reference_pair_cosine", "float's", "float"),
    MetricColumn("sentences", "sentences"),
)
REFERENCE_FREE = ("perplexity", "pair_cosine")  # keys of metrics that need no reference model


def metric_columns(measured: Iterable[Measurement]) -> tuple[MetricColumn, ...]:
    """Return the columns for these measurements: those of encoders if one of them has `pair_cosine`."""
    is_embedding = any(m.get("pair_cosine") is not None for m in measured)
    return EMBEDDING_METRICS if is_embedding else LANGUAGE_METRICS


def primary_metric(measurement: Measurement) -> str | None:
    """Return the key of the metric that needs no reference; None where nothing was measured."""
    return next((key for key in REFERENCE_FREE if measurement.get(key) is not None), None)
