"""Calibration of KV methods: ranges and levels of channels, level tables of layers.

The model runs over calibration windows once; with gradients a backward pass follows, whose squared gradient is the
diagonal of the Fisher information (Hooper et al. 2024, "KVQuant", section 3.3). Levels are found by weighted
k-means on the numbers normalized by scale and zero: weight = squared gradient of the loss times squared scale,
as the error is multiplied by the scale again (appendix E; the authors' released code omits the scale).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from bitmill.compat import forward_with_cache
from bitmill.errors import CalibrationError
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.codec import CalibratedParams, TensorCodec, affine
from bitmill.kv.rope import Rope, rope_to_undo
from bitmill.kv.scheme import PAGE, KVMethod, Scheme, TensorScheme
from bitmill.numerics.kmeans import kmeans
from bitmill.numerics.table import Table
from bitmill.progress import Progress

_RECORDED_TOKENS = 8192  # per layer, spread evenly over the windows
_KMEANS_NUMBERS = 1 << 18  # per layer, for one table of levels
_EPS = 1e-6  # deviation of a channel that never changes


def calibrate(
    model: nn.Module, method: KVMethod, windows: Tensor, progress: Progress | None = None
) -> KVCalibration:
    """Calibrate a KV method for a model.

    Args:
        model: in float, or with weights decoded to float where the method uses gradients.
        method: KV method.
        windows: token windows (samples, length).
        progress: observer of both passes.

    Returns:
        Calibrated parameters of all layers; none for a method that needs none.

    Raises:
        CalibrationError: windows are too short, or gradients are not finite.
    """
    if not method.scheme().is_calibrated:
        return KVCalibration(method, ())
    recording = record_keys_values(model, windows, method.uses_gradients, progress)
    return fit_calibration(model, method, recording, progress)


@dataclass(frozen=True)
class KVSample:
    """Recorded tokens of a layer.

    Attributes:
        keys, values: fp32 (tokens, heads, dim), keys after RoPE.
        key_gradient, value_gradient: of those shapes, or None.
        positions: (tokens,), position of each token in its window.
    """

    keys: Tensor
    values: Tensor
    key_gradient: Tensor | None
    value_gradient: Tensor | None
    positions: Tensor


@dataclass(frozen=True)
class KVRecording:
    """Recorded tokens of all layers, independent of the method.

    Attributes:
        layers: samples of each layer, None for layers without keys and values.
        windows: samples and length of the token windows.
        time_s: seconds that recording took.
    """

    layers: list[KVSample | None]
    windows: tuple[int, int]
    time_s: float


class _RecordingLayer(DynamicLayer):
    """Cache layer that returns its input and keeps the tensors the loss is differentiated by."""

    def __init__(self, with_gradients: bool) -> None:
        super().__init__()
        self.with_gradients = with_gradients

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Record keys and values (windows, heads, tokens, dim) and return them."""
        self.states = [key_states.detach(), value_states.detach()]
        if not self.with_gradients:
            return key_states, value_states
        # added zeros that require gradients: the weights require none, so that theirs are not computed
        self.offsets = [torch.zeros_like(states, requires_grad=True) for states in self.states]
        return key_states + self.offsets[0], value_states + self.offsets[1]

    def sample(self, positions: Tensor) -> KVSample:
        """Return the recorded tokens at these positions. Raise CalibrationError where gradients are not finite."""

        def at_positions(states: Tensor) -> Tensor:
            return states[0, :, positions].transpose(0, 1).float()

        keys, values = (at_positions(states) for states in self.states)
        if not self.with_gradients:
            return KVSample(keys, values, None, None, positions)
        gradients = [at_positions(x.grad if x.grad is not None else torch.zeros_like(x)) for x in self.offsets]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise CalibrationError("The gradient of the loss is NaN or infinite; calibrate with fisher=false.")
        return KVSample(keys, values, gradients[0], gradients[1], positions)


def check_windows(windows: Tensor) -> None:
    """Raise CalibrationError for windows (samples, length) on which no method can be calibrated."""
    if windows.shape[1] <= PAGE:
        raise CalibrationError(
            f"Windows have {windows.shape[1]} tokens, too few to calibrate a KV cache on; give more than {PAGE}."
        )


def record_keys_values(
    model: Any, windows: Tensor, with_gradients: bool, progress: Progress | None = None
) -> KVRecording:
    """Record the keys and values of a model on token windows.

    The whole model is differentiated, so that it runs in one piece and not block by block.

    Args:
        model: a decoder; with float weights if gradients are recorded.
        windows: token windows (samples, length).
        with_gradients: also record the gradients of the loss of the next token.
        progress: observer.

    Raises:
        CalibrationError: windows are too short, or gradients are not finite.
    """
    progress, started = progress or Progress(), time.perf_counter()
    samples, length = windows.shape
    check_windows(windows)
    positions = torch.linspace(0, length - 1, min(max(PAGE, _RECORDED_TOKENS // samples), length)).long()
    recorded: list[list[KVSample]] = [[] for _ in DynamicCache(config=model.config).layers]
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    progress.start("recording keys and values", samples)
    try:
        for window in windows:
            layers = _run_window(model, window, with_gradients)
            for layer, of_layer in zip(layers, recorded):
                if isinstance(layer, _RecordingLayer):
                    of_layer.append(layer.sample(positions))
            progress.advance(1)
    finally:
        for parameter, before in zip(model.parameters(), requires_grad):
            parameter.requires_grad_(before)
    progress.finish()
    return KVRecording([_concatenate(each) for each in recorded], (samples, length), time.perf_counter() - started)


def _run_window(model: Any, window: Tensor, with_gradients: bool) -> list[Any]:
    """Run a window (length,) forward, and backward for gradients; return the layers of its cache."""
    kinds = DynamicCache(config=model.config).layers  # new ones for each window: some keep its state
    layers: list[Any] = [_RecordingLayer(with_gradients) if isinstance(k, DynamicLayer) else k for k in kinds]
    with torch.set_grad_enabled(with_gradients):
        logits = forward_with_cache(model, window[None], Cache(layers=layers))[0].logits[0, :-1]
        if with_gradients:
            nn.functional.cross_entropy(logits.float(), window[1:]).backward()
    return layers


def _concatenate(samples: list[KVSample]) -> KVSample | None:
    if not samples:
        return None

    def joined(name: str) -> Any:
        pieces = [getattr(sample, name) for sample in samples]
        return None if pieces[0] is None else torch.cat(pieces)

    keys, values, positions = joined("keys"), joined("values"), joined("positions")
    return KVSample(keys, values, joined("key_gradient"), joined("value_gradient"), positions)


def fit_calibration(
    model: nn.Module, method: KVMethod, recording: KVRecording, progress: Progress | None = None
) -> KVCalibration:
    """Determine the calibrated parameters of a method from recorded tokens.

    Args:
        model: the model that was recorded.
        method: KV method.
        recording: of the model; with gradients if the method uses them.
        progress: observer.

    Raises:
        CalibrationError: fewer than 32 tokens are left without the attention sinks, which stay in fp16.
    """
    progress, started = progress or Progress(), time.perf_counter()
    scheme, uses_gradients = method.scheme(), method.uses_gradients
    layers: list[tuple[CalibratedParams, CalibratedParams]] = []
    progress.start("learning levels of keys and values", len(recording.layers))
    for number, sample in enumerate(recording.layers):
        if sample is None:
            layers.append((CalibratedParams(), CalibratedParams()))
            continue
        rope = rope_to_undo(model, scheme, number)
        keys, values = _training_numbers(scheme, sample, rope, recording.windows[1])
        layers.append((_fit(scheme.keys, *keys, uses_gradients), _fit(scheme.values, *values, uses_gradients)))
        progress.advance(1)
    progress.finish()
    samples, length = recording.windows
    seconds = recording.time_s + time.perf_counter() - started
    return KVCalibration(
        method, tuple(layers), {"windows": samples, "seqlen": length, "time_s": round(seconds, 1)}
    )


def _training_numbers(
    scheme: Scheme, sample: KVSample, rope: Rope | None, length: int
) -> list[tuple[Tensor, Tensor]]:
    """Return numbers as they are stored and their squared gradients, or ones, for keys and for values.

    Tensors are (tokens, heads, dim), without attention sinks. length: of a window, in tokens.
    """
    keys, gradient, positions = sample.keys, sample.key_gradient, sample.positions[None]
    if rope is not None:
        keys = rope.undo(keys.transpose(0, 1)[None], positions)[0].transpose(0, 1)
        if gradient is not None:
            gradient = rope.undo_gradient(gradient.transpose(0, 1)[None], positions)[0].transpose(0, 1)
    kept = (sample.positions >= scheme.sink).nonzero()[:, 0]
    kept = kept[: len(kept) // PAGE * PAGE]
    if not len(kept):
        raise CalibrationError(
            f"Windows of {length} tokens leave fewer than {PAGE} to learn from without the first {scheme.sink} "
            "(sink); give longer windows, or a smaller sink."
        )
    tensors = ((keys, gradient), (sample.values, sample.value_gradient))
    return [(x[kept], torch.ones_like(x[kept]) if g is None else g[kept].square()) for x, g in tensors]


def _fit(scheme: TensorScheme, x: Tensor, importance: Tensor, uses_gradients: bool) -> CalibratedParams:
    """Return the parameters of keys or values (tokens, heads, dim), given the importance of their errors."""
    if not scheme.is_calibrated:
        return CalibratedParams()
    heads, dim = x.shape[1:]
    x = x.flatten(1)
    importance = importance.flatten(1) if uses_gradients else torch.ones_like(x)
    params = CalibratedParams()
    if scheme.equalized:
        mean = x.mean(0)
        deviation = _channel_deviation(x.std(0), mean)
        params = CalibratedParams(mean=mean, deviation=deviation)
        x, importance = (x - mean) / deviation, importance * deviation.square()
    if uses_gradients and scheme.outliers:
        params = replace(params, weight=importance.mean(0).sqrt())
    if scheme.axis == "static":
        low, high = (_quantile(x, share) for share in (scheme.outliers / 2, 1 - scheme.outliers / 2))
        scale, zero = affine(low, high, scheme)
        params = replace(params, scale=scale, zero=zero)
    if scheme.levels != "learned":
        return params
    if scheme.axis == "channel":
        normal, weight = x.mT.contiguous(), importance.mT.contiguous()
    else:
        normal, weight = (values[None] for values in _inliers(scheme, (heads, dim), params, x, importance))
    edges = kmeans(normal, weight, 1 << scheme.bits).to(torch.float16).float()
    levels = _preserve_moments(edges, normal) if scheme.q_norm else edges
    shape = edges.shape if scheme.axis == "channel" else edges.shape[1:]
    return replace(params, levels=levels.view(shape), edges=edges.view(shape) if scheme.q_norm else None)


def _channel_deviation(deviation: Tensor, mean: Tensor) -> Tensor:
    """Return the deviations to divide channels by.

    A channel that hardly changed so far may do so later, and must stay in the range of fp16 then: no deviation
    is below a hundredth of the median, nor below the resolution of fp16 at the channel's mean.
    """
    return deviation.maximum(0.01 * deviation.median()).maximum(mean.abs() * 2.0**-10).clamp(min=_EPS)


def _inliers(
    scheme: TensorScheme, shape: tuple[int, int], params: CalibratedParams, x: Tensor, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Return normalized numbers and their weights (n,), without those beyond the range of the scale.

    shape: heads and head dimension.  x, importance: (tokens, channels).
    """
    placeholder = replace(params, levels=torch.arange(1 << scheme.bits).float())
    codec = TensorCodec.from_params(scheme, *shape, placeholder)
    normal, scales = (values[0] for values in codec.normalize(x[None]))
    inside = (normal.abs() <= 1) if scheme.outliers else torch.ones_like(normal, dtype=torch.bool)
    normal, weight = normal[inside], (importance * scales.square())[inside]
    if len(normal) > _KMEANS_NUMBERS:
        chosen = torch.linspace(0, len(normal) - 1, _KMEANS_NUMBERS, dtype=torch.float64).long()
        normal, weight = normal[chosen], weight[chosen]
    return normal, weight


def _preserve_moments(levels: Tensor, normal: Tensor) -> Tensor:
    """Return levels (tables, n), shifted and scaled so that decoded numbers keep mean and deviation.

    Section 3.6 of the paper (Q-Norm). normal: the numbers (tables, m).
    """
    adjusted = []
    for table, row in zip(levels, normal):
        decoded = table[Table(table).codes(row).long()]
        stretch = row.std() / decoded.std().clamp(min=_EPS)
        adjusted.append(table * stretch + (row.mean() - decoded.mean() * stretch))
    return torch.stack(adjusted)


def _quantile(x: Tensor, share: float) -> Tensor:
    """Return a quantile of every column, interpolated; torch.quantile refuses large inputs."""
    place = share * (x.shape[0] - 1)
    ordered = x.sort(0).values
    low = ordered[int(place)]
    return low + (ordered[min(int(place) + 1, x.shape[0] - 1)] - low) * (place - int(place))
