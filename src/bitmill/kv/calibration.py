"""Find what a KV method wants to know beforehand: ranges of key channels, and levels.

One forward pass over calibration windows records every layer's keys and values; with `fisher`, a backward pass
adds the gradient of the loss, whose square says how much an error matters there. Levels are then weighted k-means
of the numbers as scale and zero leave them, by squared gradient times squared scale, as the error is scaled back
(Hooper et al. 2024, "KVQuant", section 3.3 and appendix E; their released code forgets the scale).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from bitmill.errors import CalibrationError
from bitmill.kv.base import PAGE, KVMethod, Side
from bitmill.kv.cache import rope_for
from bitmill.kv.calibrated import Calibration
from bitmill.kv.levels import affine
from bitmill.kv.rope import Rope
from bitmill.kv.side import Calibrated, Coder
from bitmill.numerics.kmeans import kmeans
from bitmill.numerics.table import Table
from bitmill.progress import Progress

_TOKENS = 8192  # that are kept of a layer, spread evenly over the windows
_NUMBERS = 1 << 18  # that levels of a layer are learned from
_LEAST = 1e-6  # a channel that never changes


@dataclass
class _Seen:
    """Some tokens of a layer: keys as they are stored and values, (tokens, heads, dim), and squared gradients."""

    numbers: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    fisher: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))


class _Recorder(DynamicLayer):
    """Passes keys and values on, and holds what the loss can be differentiated by."""

    def __init__(self, fisher: bool) -> None:
        super().__init__()
        self.fisher = fisher

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (windows, heads, tokens, dim), as they came."""
        self.held = [key_states.detach(), value_states.detach()]
        if not self.fisher:
            return key_states, value_states
        # a zero that wants its gradient: weights need none, so that nothing of theirs is computed
        self.moves = [torch.zeros_like(states, requires_grad=True) for states in self.held]
        return key_states + self.moves[0], value_states + self.moves[1]


@dataclass
class Recording:
    """What was seen of every layer, None for those without keys and values; methods of a kind can share one.

    windows: (samples, length) of them.  time_s: of recording.
    """

    layers: list[_Seen | None]
    windows: tuple[int, int]
    time_s: float


def calibrate(
    model: nn.Module, method: KVMethod, windows: Tensor, progress: Progress | None = None
) -> Calibration:
    """What `method` needs to know about each layer of a model, from token windows (samples, length).

    model: in float, or with weights decoded to float where the method differentiates (`fisher`).

    Raises CalibrationError for windows shorter than a page, and where gradients are not finite.
    """
    if not method.scheme().is_calibrated:
        return Calibration(method, ())
    return learn(method, record(model, method, windows, progress), progress)


def record(model: Any, method: KVMethod, windows: Tensor, progress: Progress | None = None) -> Recording:
    """Keys, values and squared gradients of all layers, in the form in which the method stores them."""
    scheme, fisher = method.scheme(), bool(getattr(method, "fisher", False))
    progress, started = progress or Progress(), time.perf_counter()
    samples, length = windows.shape
    if length - scheme.sink < PAGE:
        raise CalibrationError(
            f"Windows have {length} tokens, too few to calibrate a KV cache on; give more than {PAGE}."
        )
    kinds = list(DynamicCache(config=model.config).layers)
    ropes = [rope_for(model, scheme, number) for number in range(len(kinds))]
    seen: list[_Seen | None] = [_Seen() if isinstance(layer, DynamicLayer) else None for layer in kinds]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    progress.start("recording keys and values", samples)
    try:
        for window in windows:
            layers: list[Any] = [
                layer if seen[number] is None else _Recorder(fisher) for number, layer in enumerate(kinds)
            ]
            with torch.set_grad_enabled(fisher):
                logits = model(window[None], past_key_values=Cache(layers=layers), use_cache=True).logits[0, :-1]
                if fisher:
                    nn.functional.cross_entropy(logits.float(), window[1:]).backward()
            for layer, of_layer, rope in zip(layers, seen, ropes):
                if of_layer is not None:
                    _take(of_layer, layer, rope, scheme.sink, max(PAGE, _TOKENS // samples))
            progress.advance(1)
    finally:
        for parameter, wanted in zip(model.parameters(), wants):
            parameter.requires_grad_(wanted)
    progress.finish()
    return Recording(seen, (samples, length), time.perf_counter() - started)


def learn(method: KVMethod, recording: Recording, progress: Progress | None = None) -> Calibration:
    """Ranges and levels of all layers."""
    progress, started = progress or Progress(), time.perf_counter()
    scheme, weigh = method.scheme(), bool(getattr(method, "fisher", False))
    found: list[tuple[Calibrated, Calibrated]] = []
    progress.start("learning levels of keys and values", len(recording.layers))
    for seen in recording.layers:
        sides = zip((scheme.keys, scheme.values), (0, 1))
        keys, values = (_fit(side, seen, which, weigh) if seen else Calibrated() for side, which in sides)
        found.append((keys, values))
        progress.advance(1)
    progress.finish()
    samples, length = recording.windows
    took = recording.time_s + time.perf_counter() - started
    return Calibration(method, tuple(found), {"windows": samples, "seqlen": length, "time_s": round(took, 1)})


def _take(seen: _Seen, layer: _Recorder, rope: Rope | None, sink: int, keep: int) -> None:
    tokens = layer.held[0].shape[-2]
    chosen = torch.linspace(sink, tokens - 1, min(keep, tokens - sink)).long()
    for side, states in enumerate(layer.held):
        gradient = layer.moves[side].grad if layer.fisher else None
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            raise CalibrationError("The gradient of the loss is NaN or infinite; calibrate with fisher=false.")
        if rope is not None and side == 0:
            positions = torch.arange(tokens, device=states.device)[None]
            states = rope.undo(states.float(), positions)
            gradient = None if gradient is None else rope.undo_gradient(gradient.float(), positions)
        seen.numbers[side].append(states[0, :, chosen].transpose(0, 1).float())
        if gradient is not None:
            seen.fisher[side].append(gradient[0, :, chosen].transpose(0, 1).float().square())


def _fit(side: Side, seen: _Seen, which: int, weigh: bool) -> Calibrated:
    if not side.is_calibrated:
        return Calibrated()
    x = torch.cat(seen.numbers[which])
    heads, dim = x.shape[1:]
    x = x[: x.shape[0] // PAGE * PAGE].flatten(1)
    felt = torch.ones_like(x)
    if weigh and seen.fisher[which]:
        felt = torch.cat(seen.fisher[which])[: x.shape[0]].flatten(1)
    found = Calibrated()
    if side.equalized:
        found = Calibrated(mean=x.mean(0), deviation=x.std(0).clamp(min=_LEAST))
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


def _inliers(
    side: Side, heads: int, dim: int, found: Calibrated, x: Tensor, felt: Tensor
) -> tuple[Tensor, Tensor]:
    """Numbers as one table of levels sees them, and their weights, (n,); without those beyond the scale."""
    placeholder = replace(found, levels=torch.arange(1 << side.bits).float())
    normal, scales = (values[0] for values in Coder(side, heads, dim, placeholder).normalized(x[None]))
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
