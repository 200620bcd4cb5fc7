"""Find what a KV method wants to know beforehand: ranges and levels of channels, levels of layers.

Levels are weighted k-means of the numbers as scale and zero leave them: weight = squared gradient of the loss
times squared scale, as the error is scaled back (Hooper et al. 2024, "KVQuant", section 3.3 and appendix E; their
released code forgets the scale).
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitmill.errors import CalibrationError
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.codec import CalibratedParams, TensorCodec
from bitmill.kv.levels import affine
from bitmill.kv.recording import KVRecording, KVSample, record_keys_values
from bitmill.kv.rope import Rope, rope_for
from bitmill.kv.scheme import PAGE, KVMethod, Scheme, TensorScheme
from bitmill.numerics.kmeans import kmeans
from bitmill.numerics.table import Table
from bitmill.progress import Progress

_NUMBERS = 1 << 18  # that levels of a layer are learned from
_LEAST = 1e-6  # a channel that never changes


def calibrate(
    model: nn.Module, method: KVMethod, windows: Tensor, progress: Progress | None = None
) -> KVCalibration:
    """What `method` needs to know about each layer of a model, from token windows (samples, length).

    model: in float, or with weights decoded to float where the method differentiates (`fisher`).

    Raises CalibrationError for windows too short, and where gradients are not finite.
    """
    if not method.scheme().is_calibrated:
        return KVCalibration(method, ())
    return fit_calibration(
        model, method, record_keys_values(model, windows, method.weighs_errors, progress), progress
    )


def fit_calibration(
    model: nn.Module, method: KVMethod, recording: KVRecording, progress: Progress | None = None
) -> KVCalibration:
    """The same from what was recorded of the model.

    Raises CalibrationError where fewer than 32 tokens are left without the first ones, which stay in float.
    """
    progress, started = progress or Progress(), time.perf_counter()
    scheme, weigh = method.scheme(), method.weighs_errors
    found: list[tuple[CalibratedParams, CalibratedParams]] = []
    progress.start("learning levels of keys and values", len(recording.layers))
    for number, seen in enumerate(recording.layers):
        if seen is None:
            found.append((CalibratedParams(), CalibratedParams()))
            continue
        keys, values = _numbers(scheme, seen, rope_for(model, scheme, number), recording.windows[1])
        found.append((_fit(scheme.keys, *keys, weigh), _fit(scheme.values, *values, weigh)))
        progress.advance(1)
    progress.finish()
    samples, length = recording.windows
    took = recording.time_s + time.perf_counter() - started
    return KVCalibration(method, tuple(found), {"windows": samples, "seqlen": length, "time_s": round(took, 1)})


def _numbers(scheme: Scheme, seen: KVSample, rope: Rope | None, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys as they are stored and values, (tokens, heads, dim), without sinks, with squared gradients, or ones.

    length: of windows, in tokens.
    """
    keys, gradient, positions = seen.keys, seen.key_gradient, seen.positions[None]
    if rope is not None:
        keys = rope.undo(keys.transpose(0, 1)[None], positions)[0].transpose(0, 1)
        if gradient is not None:
            gradient = rope.undo_gradient(gradient.transpose(0, 1)[None], positions)[0].transpose(0, 1)
    kept = (seen.positions >= scheme.sink).nonzero()[:, 0]
    kept = kept[: len(kept) // PAGE * PAGE]
    if not len(kept):
        raise CalibrationError(
            f"Windows of {length} tokens leave fewer than {PAGE} to learn from without the first {scheme.sink} "
            "(sink); give longer windows, or a smaller sink."
        )
    sides = ((keys, gradient), (seen.values, seen.value_gradient))
    return [(x[kept], torch.ones_like(x[kept]) if g is None else g[kept].square()) for x, g in sides]


def _fit(side: TensorScheme, x: Tensor, felt: Tensor, weigh: bool) -> CalibratedParams:
    if not side.is_calibrated:
        return CalibratedParams()
    heads, dim = x.shape[1:]
    x, felt = x.flatten(1), felt.flatten(1) if weigh else torch.ones_like(x).flatten(1)
    found = CalibratedParams()
    if side.equalized:
        mean = x.mean(0)
        found = CalibratedParams(mean=mean, deviation=_deviation(x.std(0), mean))
        x, felt = (x - found.mean) / found.deviation, felt * found.deviation.square()  # type: ignore[operator, union-attr]
    if weigh and side.outliers:
        found = replace(found, weight=felt.mean(0).sqrt())
    if side.axis == "static":
        low, high = (_quantile(x, share) for share in (side.outliers / 2, 1 - side.outliers / 2))
        scale, zero = affine(low, high, side)
        found = replace(found, scale=scale, zero=zero)
    if side.levels != "learned":
        return found
    if side.axis == "channel":
        normal, weight = x.mT.contiguous(), felt.mT.contiguous()
    else:
        normal, weight = (values[None] for values in _inliers(side, heads, dim, found, x, felt))
    edges = kmeans(normal, weight, 1 << side.bits).to(torch.float16).float()
    levels = _normed(edges, normal) if side.q_norm else edges
    shape = edges.shape if side.axis == "channel" else edges.shape[1:]
    return replace(found, levels=levels.view(shape), edges=edges.view(shape) if side.q_norm else None)


def _deviation(found: Tensor, mean: Tensor) -> Tensor:
    """Deviations to divide channels by.

    One that hardly changed so far may do so later, and must stay in the range of fp16 then: none is below
    a hundredth of the median, nor below what fp16 tells apart at the channel's mean.
    """
    return found.maximum(0.01 * found.median()).maximum(mean.abs() * 2.0**-10).clamp(min=_LEAST)


def _inliers(
    side: TensorScheme, heads: int, dim: int, found: CalibratedParams, x: Tensor, felt: Tensor
) -> tuple[Tensor, Tensor]:
    """Numbers as one table of levels sees them, and their weights, (n,); without those beyond the scale."""
    placeholder = replace(found, levels=torch.arange(1 << side.bits).float())
    normal, scales = (values[0] for values in TensorCodec(side, heads, dim, placeholder).normalized(x[None]))
    inside = (normal.abs() <= 1) if side.outliers else torch.ones_like(normal, dtype=torch.bool)
    normal, weight = normal[inside], (felt * scales.square())[inside]
    if len(normal) > _NUMBERS:
        chosen = torch.linspace(0, len(normal) - 1, _NUMBERS, dtype=torch.float64).long()
        normal, weight = normal[chosen], weight[chosen]
    return normal, weight


def _normed(levels: Tensor, normal: Tensor) -> Tensor:
    """Levels (tables, n), moved so that what is stored has mean and deviation of the numbers (tables, m).

    Section 3.6 of the paper (Q-Norm).
    """
    moved = []
    for table, row in zip(levels, normal):
        stored = table[Table(table).codes(row).long()]
        stretch = row.std() / stored.std().clamp(min=_LEAST)
        moved.append(table * stretch + (row.mean() - stored.mean() * stretch))
    return torch.stack(moved)


def _quantile(x: Tensor, share: float) -> Tensor:
    """Of every column; torch.quantile refuses large inputs."""
    place = share * (x.shape[0] - 1)
    ordered = x.sort(0).values
    low = ordered[int(place)]
    return low + (ordered[min(int(place) + 1, x.shape[0] - 1)] - low) * (place - int(place))
