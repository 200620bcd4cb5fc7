"""The fields of a report that other code relies on, and their types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from bitmill.checkpoint.contents import REPORT, read_json
from bitmill.errors import CheckpointError, quoted
from bitmill.report.metrics import CLASS_METRICS, EMBEDDING_METRICS, LANGUAGE_METRICS
from bitmill.report.results import Sample

Side = Annotated[int, Field(gt=0)]


class _Entry(BaseModel):
    """An object of the report; fields that are not listed are not checked."""

    model_config = ConfigDict(extra="allow", strict=True)


class LayerSummary(_Entry):
    """Summary of a quantized layer; `shape` is [out, in]."""

    name: str
    shape: Annotated[list[Side], Field(min_length=2, max_length=2)]
    format: str | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    weight_error: float | None = None
    output_error: float | None = None


class Answer(Sample):
    """The answer of one model to a prompt."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Answers(_Entry):
    """A prompt, answered by the quantized and by the float model."""

    prompt: str
    answer: Answer
    reference_answer: Answer
    chat: bool | None = None
    max_new_tokens: int | None = None


_FIELDS: Any = {
    **dict.fromkeys(("by", "text", "split", "reference", "kv_method"), (str | None, None)),
    **dict.fromkeys(("seqlen", "windows", "tokens"), (int | None, None)),
    **{metric.key: (float | None, None) for metric in LANGUAGE_METRICS + EMBEDDING_METRICS + CLASS_METRICS},
}
Measurement: Any = create_model("Measurement", __base__=_Entry, **_FIELDS)


class Report(_Entry):
    """A report; fields may be missing in those of earlier versions."""

    layers: list[LayerSummary]
    measured: list[Measurement]
    bitmill: str | None = None
    source: str | None = None
    recipe: dict[str, Any] | None = None
    identity: dict[str, Any] | None = None
    kv: dict[str, Any] | None = None
    trained: dict[str, Any] | None = None
    budget: dict[str, Any] | None = None
    samples: list[Answers] = []
    running: dict[str, Any] | None = None
    ends: dict[str, Any] | None = None
    bits_per_weight: float | None = None
    head_bits_per_weight: float | None = None


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a quantized folder; empty where it has none, as `save_pretrained` leaves it.

    Raises:
        CheckpointError: it is damaged, or a field is missing or of another type.
    """
    if not (folder / REPORT).exists():
        return {}
    report = read_json(folder, REPORT)
    try:
        Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{folder}/{REPORT} is damaged: {place} is {quoted(first['input'])} ({first['msg']}); "
            "copy it again, or quantize again."
        ) from None
    return report
