"""What a model puts into its cache of keys and values, and how much the loss minds errors there.

One forward pass over calibration windows; with `fisher` a backward pass as well, whose gradient's square is the
diagonal of the Fisher information (Hooper et al. 2024, "KVQuant", section 3.3).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from bitmill.compat import forward_with_cache
from bitmill.errors import CalibrationError
from bitmill.kv.scheme import PAGE
from bitmill.progress import Progress

_TOKENS = 8192  # that are kept of a layer, spread evenly over the windows


@dataclass(frozen=True)
class KVSample:
    """Some tokens of a layer. keys, after RoPE, and values: fp32 (tokens, heads, dim); their gradients or None.

    positions: (tokens,), of each in its window.
    """

    keys: Tensor
    values: Tensor
    key_gradient: Tensor | None
    value_gradient: Tensor | None
    positions: Tensor


@dataclass(frozen=True)
class KVRecording:
    """What was seen of every layer, None for those without keys and values; any method can learn from it.

    windows: (samples, length) of them.  time_s: of recording.
    """

    layers: list[KVSample | None]
    windows: tuple[int, int]
    time_s: float


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

    def some(self, chosen: Tensor) -> KVSample:
        """The chosen tokens. Raises CalibrationError where gradients are not finite."""

        def of(states: Tensor) -> Tensor:
            return states[0, :, chosen].transpose(0, 1).float()

        keys, values = (of(states) for states in self.held)
        if not self.fisher:
            return KVSample(keys, values, None, None, chosen)
        gradients = [of(move.grad if move.grad is not None else torch.zeros_like(move)) for move in self.moves]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise CalibrationError("The gradient of the loss is NaN or infinite; calibrate with fisher=false.")
        return KVSample(keys, values, gradients[0], gradients[1], chosen)


def record_keys_values(model: Any, windows: Tensor, fisher: bool, progress: Progress | None = None) -> KVRecording:
    """Keys and values of a model on token windows (samples, length), with `fisher` their gradients too.

    model: in float where gradients are wanted.

    Raises CalibrationError for windows too short, and where gradients are not finite.
    """
    progress, started = progress or Progress(), time.perf_counter()
    samples, length = windows.shape
    if length <= PAGE:
        raise CalibrationError(
            f"Windows have {length} tokens, too few to calibrate a KV cache on; give more than {PAGE}."
        )
    chosen = torch.linspace(0, length - 1, min(max(PAGE, _TOKENS // samples), length)).long()
    seen: list[list[KVSample]] = [[] for _ in DynamicCache(config=model.config).layers]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    progress.start("recording keys and values", samples)
    try:
        for window in windows:
            kinds = DynamicCache(config=model.config).layers  # anew: some keep a state of the window
            layers: list[Any] = [_Recorder(fisher) if isinstance(kind, DynamicLayer) else kind for kind in kinds]
            with torch.set_grad_enabled(fisher):
                logits = forward_with_cache(model, window[None], Cache(layers=layers))[0].logits[0, :-1]
                if fisher:
                    nn.functional.cross_entropy(logits.float(), window[1:]).backward()
            for layer, of_layer in zip(layers, seen):
                if isinstance(layer, _Recorder):
                    of_layer.append(layer.some(chosen))
            progress.advance(1)
    finally:
        for parameter, wanted in zip(model.parameters(), wants):
            parameter.requires_grad_(wanted)
    progress.finish()
    return KVRecording([_joined(some) for some in seen], (samples, length), time.perf_counter() - started)


def _joined(some: list[KVSample]) -> KVSample | None:
    if not some:
        return None

    def all_of(part: str) -> Any:
        pieces = [getattr(seen, part) for seen in some]
        return None if pieces[0] is None else torch.cat(pieces)

    keys, values, positions = all_of("keys"), all_of("values"), all_of("positions")
    return KVSample(keys, values, all_of("key_gradient"), all_of("value_gradient"), positions)
