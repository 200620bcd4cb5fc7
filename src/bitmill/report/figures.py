"""The figures of a measurement: which there are, what they are called, how they are shown.

A measurement, as `quantize` and `evaluate` return it, has those of a language model or those of an encoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bitmill.report import numbers

Measurement = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One figure.

    key: in the measurement.  name, unit: in full.  short: over a narrow column.  note: what it says; it has a tile
    on the page then.  against: key of the float model's own figure.  share: shown as a percentage.
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
        """The short name, where there is one."""
        return self.short or self.name

    def shown(self, measurement: Measurement) -> str:
        """For pages; a dash where it is missing."""
        value = measurement.get(self.key)
        return numbers.percent(value) if self.share else numbers.number(value, self.digits)


LANGUAGE = (
    Figure("perplexity", "perplexity", note="of the quantized model", against="reference_perplexity"),
    Figure("reference_perplexity", "float"),
    Figure("kl_divergence", "KL divergence", "KL, nats", "nats", note="nats a token from float", digits=3),
    Figure("top1_agreement", "top-1 agreement", "top-1", note="the likeliest token is float's", share=True),
)
EMBEDDING = (
    Figure("cosine_similarity", "cosine to float", "cosine", note="of a sentence's two embeddings"),
    Figure("neighbour_agreement", "same neighbour", note="the nearest sentence is float's", share=True),
    Figure("pair_cosine", "cosine of two sentences", "two sentences"),
    Figure("reference_pair_cosine", "float's", "float"),
    Figure("sentences", "sentences"),
)
OWN = ("perplexity", "pair_cosine")  # what a model has by itself, without a reference


def figures_of(measured: Iterable[Measurement]) -> tuple[Figure, ...]:
    """The columns for these measurements."""
    return EMBEDDING if any(m.get("pair_cosine") is not None for m in measured) else LANGUAGE


def own_figure(measurement: Measurement) -> str | None:
    """The key of the figure that the model has by itself; None where nothing was measured."""
    return next((key for key in OWN if measurement.get(key) is not None), None)
