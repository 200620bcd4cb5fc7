"""The schema of results.json: what `bitmill compare` measured, as plain data that is checked when it is read.

Everything the terminal table and the page show is made from this file alone. Fields are None where there is
nothing to say: a variant that failed has no perplexity.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bitmill.errors import CheckpointError


class _Plain(BaseModel):
    """Unknown keys are refused, so that a misspelling cannot pass for a missing figure."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Sample(_Plain):
    """The greedy answer to one prompt."""

    text: str
    new_tokens: int
    stopped: Literal["eos", "length"]


class Layer(_Plain):
    """One quantized layer; errors are relative squared errors, of the weights and of the outputs."""

    name: str
    format: str
    shape: list[int]
    bits_per_weight: float
    size_bytes: int
    weight_error: float | None
    output_error: float | None


class Float(_Plain):
    """The float model: the row that every variant is compared with."""

    bits_per_weight: float
    size_bytes: int
    perplexity: float
    tokens: int
    samples: list[Sample]


class Variant(_Plain):
    """One cell of the grid: a recipe, what became of it, what it costs and how good it is."""

    name: str
    method: str
    bits: int | None = None  # as asked for
    status: Literal["done", "failed", "not_applicable", "pending"] = "pending"
    reason: str | None = None
    recipe: dict[str, Any] | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    tokens: int | None = None
    quantize_time_s: float | None = None
    peak_memory_bytes: int | None = None
    layers: list[Layer] = []
    samples: list[Sample] = []


class Text(_Plain):
    """Token windows: where they come from, and their digest."""

    source: str
    windows: int
    seqlen: int
    seed: int | None = None
    sha256: str


class Settings(_Plain):
    """What all variants have in common."""

    model: str
    fingerprint: str  # sha256 of the model's config and weights
    calibration: Text
    evaluation: Text
    prompts: list[str]
    chat: bool  # whether the prompts were put through the tokenizer's chat template
    max_new_tokens: int
    propagate: Literal["quantized", "float"]
    device: str


class Machine(_Plain):
    """What the times and the memory were measured on."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    gpu: str | None
    system: str
    versions: dict[str, str]


class Results(_Plain):
    """The whole of results.json."""

    schema_version: Literal[1] = 1
    commands: list[str]  # those that made the folder, the last one last
    settings: Settings
    machine: Machine
    float: Float | None
    variants: list[Variant]

    def done(self) -> list[Variant]:
        """The variants that were measured."""
        return [variant for variant in self.variants if variant.status == "done"]


def read_results(path: Path) -> Results:
    """Read results.json. Raises CheckpointError, naming the first key that is wrong."""
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); run bitmill compare first.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its top"
        raise CheckpointError(
            f"{path} is not what this bitmill writes ({where}: {first['msg']}); compare again into another folder."
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON; compare again into another folder.") from None
