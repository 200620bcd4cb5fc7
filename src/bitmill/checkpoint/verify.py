"""Verify a quantized folder: every byte, every tensor, and its measured quality."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from bitmill.checkpoint.reader import Checkpoint
from bitmill.data.windows import TEXTS
from bitmill.errors import CheckpointError
from bitmill.files import sha256
from bitmill.formats.quantized import unpack
from bitmill.kv.calibration_file import FILE, read_calibration
from bitmill.kv.size import packed_shapes
from bitmill.models.config_only import open_config_only
from bitmill.models.meta import empty_model
from bitmill.progress import Progress
from bitmill.report.metrics import primary_metric
from bitmill.runtime.kernels import KernelSpec
from bitmill.runtime.kernels.agreement import disagreement

# key -> name, and the numbers that it may be: above the first, up to the second
_FIGURES = {
    "perplexity": ("perplexity", 0.0, math.inf),
    "pair_cosine": ("cosine of two sentences", -1.0, 1.0),
    "confidence": ("probability of the chosen class", 0.0, 1.0),
}


def verify(
    checkpoint: Checkpoint,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Compare every file with its recorded digest, and the products of every layer with its decoded weights.

    Args:
        checkpoint: the folder.
        progress: receives the progress.
        device: device whose kernels multiply.
        trust_remote_code: allow Python code in the folder to run.

    Returns:
        Counts of files, layers and tensors that were checked.

    Raises:
        CheckpointError: the first file or tensor that is wrong.
    """
    progress = progress or Progress()
    if not checkpoint.record:
        raise CheckpointError(
            f"{checkpoint.folder}/report.json is missing or records no files, so nothing can be verified; "
            "copy the folder again, or quantize again."
        )
    for name, entry in checkpoint.record.items():
        path = checkpoint.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but report.json records it; copy the folder again.")
        if sha256(path) != entry.sha256:
            raise CheckpointError(f"{path} was altered since it was written (its sha256 differs); copy it again.")
    _check_calibration(checkpoint, trust_remote_code)
    progress.start("verify", len(checkpoint.formats))
    for name in checkpoint.formats:
        _check_layer(checkpoint, name, torch.device(device))
        progress.advance()
    progress.finish()
    return {"files": len(checkpoint.record), "layers": len(checkpoint.formats), "tensors": len(checkpoint.entries)}


def _check_layer(checkpoint: Checkpoint, name: str, device: torch.device) -> None:
    """Check that a layer decodes to finite numbers, and that its kernel on a device multiplies with these."""
    format, shape, tensors = checkpoint.formats[name], checkpoint.shape(name), checkpoint.packed(name)
    W = unpack(format, tensors, shape).dequantize()
    if not bool(torch.isfinite(W).all()):
        raise CheckpointError(f"The layer {name!r} decodes to NaN or Inf; quantize again.")
    on_device = {part: tensor.to(device) for part, tensor in tensors.items()}
    if reason := disagreement(KernelSpec(format, shape, device), on_device, W):
        raise CheckpointError(
            f"The layer {name!r} does not run on {device} as it decodes: {reason}; "
            "set BITMILL_KERNEL=reference, and report the difference."
        )


def _check_calibration(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Check that the KV calibration is readable, finite, and fits the model and the report."""
    calibration, kv = read_calibration(checkpoint.folder), checkpoint.report.get("kv") or {}
    if kv.get("method") != (calibration.method.to_dict() if calibration else None):
        raise CheckpointError(
            f"{checkpoint.folder}/report.json and {FILE} do not say the same of keys and values; copy both again."
        )
    if calibration is None:
        return
    if calibration.method.scheme().is_calibrated:
        outline = open_config_only(checkpoint.folder, trust_remote_code=trust_remote_code)
        calibration.check(packed_shapes(empty_model(outline)))


def verify_quality(
    checkpoint: Checkpoint, evaluate: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[str, float] | None:
    """Repeat the measurement that was made while quantizing and compare the results.

    Args:
        checkpoint: the folder.
        evaluate: function of the recorded measurement (text, windows, seqlen) that returns a new one.

    Returns:
        The name of the figure and its change: relative for perplexity, absolute for an encoder's `pair_cosine`.
        None where nothing was recorded.

    Raises:
        CheckpointError: the change exceeds 0.001, or the recorded figure is not valid.
    """
    measured = [m for m in checkpoint.report["measured"] if m.get("by") == "quantize"]
    recorded = [m for m in measured if m.get("text") != TEXTS]  # those are not at hand
    if not recorded:
        return None
    key = primary_metric(recorded[0]) or "perplexity"
    name, least, most = _FIGURES[key]
    kinds = {"text": str, "split": str, "seqlen": int, "windows": int, key: float}
    for field, kind in kinds.items():
        if not isinstance(recorded[0].get(field), kind):
            raise CheckpointError(
                f"{checkpoint.folder}/report.json records the {field} {recorded[0].get(field)!r}; quantize again."
            )
    before = recorded[0][key]
    if not (math.isfinite(before) and least < before <= most):
        raise CheckpointError(
            f"{checkpoint.folder}/report.json records the {name} {before!r}, which no model has; quantize again."
        )
    result = evaluate(recorded[0])
    if result.get("prefix") and "prefix" not in recorded[0]:
        raise CheckpointError(
            f"{checkpoint.folder} was calibrated and measured on windows without the special tokens "
            f"{result['prefix']} that its tokenizer puts before a text; quantize again with this bitmill."
        )
    now = result[key]
    change = abs(now - before) / (before if key == "perplexity" else 1)
    if not change <= 1e-3:  # also when it is NaN
        raise CheckpointError(
            f"The model gives {name} {now:.4f} where {before:.4f} was recorded; its runtime or text differs."
        )
    return key, change
