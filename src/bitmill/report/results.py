"""The schema of results.json, which `bitmill compare` writes, as models that validate it.

The terminal table and the page are made from this file alone. Fields without a value are None: a variant that
failed has no perplexity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bitmill.config.documents import load_json, read_document
from bitmill.errors import CheckpointError

MAX_RECORD_BYTES = 1 << 28
TaskFigures = dict[str, int | float | list[float] | None]  # `documents`, and the figures of the task


class _StrictModel(BaseModel):
    """Refuses unknown keys, so that a misspelled key is not taken for a missing value."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Sample(_StrictModel):
    """The greedy answer to one prompt.

    token_ids: those of the answer; None in files of earlier versions.
    token_starts: the place in `text`, in characters, where each token begins.
    """

    text: str
    new_tokens: int
    stopped: Literal["eos", "length"]
    token_ids: list[int] | None = None
    token_starts: list[int] | None = None

    @model_validator(mode="after")
    def _has_all_tokens(self) -> Sample:
        """Raise ValueError where the tokens are not as many as were counted, or begin outside of the text."""
        for field in ("token_ids", "token_starts"):
            listed = getattr(self, field)
            if listed is not None and len(listed) != self.new_tokens:
                raise ValueError(f"{field} has {len(listed)} entries for {self.new_tokens} tokens")
        if self.token_starts and not 0 <= min(self.token_starts) <= max(self.token_starts) <= len(self.text):
            raise ValueError(f"token_starts has places outside of a text of {len(self.text)} characters")
        return self


class Layer(_StrictModel):
    """A quantized layer, with the relative squared errors of its weights and outputs."""

    name: str
    format: str
    shape: list[int]
    bits_per_weight: float
    size_bytes: int
    weight_error: float | None
    output_error: float | None


class _Divergence(_StrictModel):
    """Figures against the float model."""

    perplexity_ratio: float | None = None
    kl_divergence: float | None = None
    kl_interval: list[float] | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    top1_agreement: float | None = None


class DomainFigures(_Divergence):
    """Figures on the windows of one domain; those against the float model only of variants."""

    windows: int
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None


class FloatModel(_StrictModel):
    """The float model, with which every variant is compared."""

    bits_per_weight: float
    size_bytes: int
    perplexity: float
    tokens: int
    samples: list[Sample]
    domains: dict[str, DomainFigures] = {}
    tasks: dict[str, TaskFigures] = {}


_MEASURED = (  # of a variant that is done
    "bits_per_weight",
    "size_bytes",
    "perplexity",
    "kl_divergence",
    "top1_agreement",
    "quantize_time_s",
    "peak_memory_bytes",
)


class Variant(_Divergence):
    """One recipe: its state, cost and quality."""

    name: str
    method: str
    bits: int | None = None  # as requested
    status: Literal["done", "failed", "not_applicable", "pending"] = "pending"
    reason: str | None = None
    recipe: dict[str, Any] | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    perplexity: float | None = None
    tokens: int | None = None
    domains: dict[str, DomainFigures] = {}
    quantize_time_s: float | None = None
    peak_memory_bytes: int | None = None
    layers: list[Layer] = []
    samples: list[Sample] = []
    tasks: dict[str, TaskFigures] = {}

    @model_validator(mode="after")
    def _is_complete(self) -> Variant:
        """Raise ValueError for a variant that is done but lacks a figure."""
        absent = [key for key in _MEASURED if getattr(self, key) is None] if self.status == "done" else []
        if absent:
            raise ValueError(f"the variant {self.name!r} is done, but has no {absent[0]}")
        return self


class TextWindows(_StrictModel):
    """Token windows: their source, the special tokens with which each starts, and their digest.

    part, separator, domains: of a text with documents: their part, the tokens between them, and the windows of
        each domain.
    """

    source: str
    windows: int
    seqlen: int
    prefix: list[int] = []
    seed: int | None = None
    sha256: str
    part: str | None = None
    separator: list[int] = []
    domains: dict[str, int] = {}


class TaskSettings(_StrictModel):
    """Benchmark tasks that all models are measured on.

    limit: first documents of each; None for all.
    unprotected: what the sandbox did not keep programs from.
    """

    names: list[str]
    limit: int | None
    unprotected: list[str] = []


class Settings(_StrictModel):
    """Settings shared by all variants."""

    model: str
    fingerprint: str  # sha256 of the model's config and weights
    calibration: TextWindows
    evaluation: TextWindows
    prompts: list[str]
    chat: bool  # the tokenizer's chat template was applied to the prompts
    max_new_tokens: int
    propagate: Literal["quantized", "float"]
    device: str
    tasks: TaskSettings | None = None


class Machine(_StrictModel):
    """The machine of the time and memory measurements."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    gpu: str | None
    system: str
    versions: dict[str, str]


class Results(_StrictModel):
    """The document results.json."""

    schema_version: Literal[1] = 1
    commands: list[str]  # that produced the folder, the latest one last
    settings: Settings
    machine: Machine
    float: FloatModel | None
    variants: list[Variant]

    def done(self) -> list[Variant]:
        """Return the measured variants."""
        return [variant for variant in self.variants if variant.status == "done"]


def read_results(path: Path) -> Results:
    """Read and validate results.json.

    Raises:
        CheckpointError: the file cannot be read or does not match the schema; the first wrong key is named.
    """
    try:
        text = read_document(path, "document", CheckpointError, MAX_RECORD_BYTES, "run bitmill compare first")
        return Results.model_validate(load_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise CheckpointError(
            f"{path} is not what this bitmill writes ({where}: {first['msg']}); compare again into another folder."
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON; compare again into another folder.") from None
