"""The record of a quantization, report.json, without layers and the digests of files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bitmill.calibration.token_windows import JobData
from bitmill.sources.published import published_metadata
from bitmill.version import __version__
from bitmill.workflows.prepare import PreparedJob

# entries of the plan that are also in report.json
STORED = (
    "bits_per_weight", "head_bits_per_weight", "head_bytes", "unquantized_bytes", "original_bytes", "size_ratio",
    "head_note", "source_types",
)  # fmt: skip


def job_report(
    prepared: PreparedJob, data: JobData, identity: dict[str, Any], quality: dict[str, Any]
) -> dict[str, Any]:
    """Return report.json without the layers and the digests of files.

    Args:
        prepared: the job.
        data: the tokens that calibrate and that measure.
        identity: everything that decides the bytes of the result.
        quality: figures measured while quantizing; empty where nothing was measured.
    """
    streamed, recipe, plan = prepared.streamed, prepared.recipe, prepared.plan
    ends = prepared.resolved.ends if prepared.resolved else None
    formats = prepared.resolved.head_formats if prepared.resolved else {}
    return {
        "bitmill": __version__,
        "source": streamed.source.name,
        **({"hub": asdict(origin)} if (origin := streamed.source.origin) else {}),
        **({"published": published} if (published := published_metadata(streamed.source)) else {}),
        "recipe": recipe.to_dict() if recipe is not None else None,
        "identity": identity,
        **{key: plan[key] for key in STORED},
        "ends": ends.to_dict() if ends else None,
        **({"head_formats": {name: format.to_dict() for name, format in formats.items()}} if ends else {}),
        "auto_class": streamed.task.auto_class_name,
        **({"unused": streamed.unused} if streamed.unused else {}),
        **({"float_matrices": plan["float_matrices"]} if plan.get("float_matrices") else {}),
        **({"kv": plan["kv"]} if plan["kv"] else {}),
        **({"budget": plan["budget"]} if plan.get("budget") else {}),
        "measured": [{"by": "quantize", **data.described["held_out"], **quality}] if quality else [],
    }
