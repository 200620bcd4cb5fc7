"""A packed cache of keys and values for any decoder of transformers."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bitmill.compat import cache_argument
from bitmill.errors import CheckpointError, UsageError
from bitmill.kv.attention import attach
from bitmill.kv.calibration_file import KVCalibration, read_calibration
from bitmill.kv.codec import CalibratedParams
from bitmill.kv.config import calibration_command, describe
from bitmill.kv.decode_step import DecodeStepCache
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.rope import rope_for
from bitmill.kv.saved import SavedCache, write_cache
from bitmill.kv.scheme import KVMethod, kv_method
from bitmill.kv.support import packed_shapes

_NONE = (CalibratedParams(), CalibratedParams())


class QuantizedCache(Cache):
    """Keys and values of a model's sequences, packed; pass it as `past_key_values`.

    model: the model it is for, with float or quantized weights.
    method: a KV method or its name; without one, what the model's folder was calibrated for.
    calibration: what a method that needs it was calibrated to; looked for in the model's folder without it.
    remembers: keep decoded pages, for who reads everything again and again and has the memory.
    options: of the method, such as bits=3.

    Making one sets the model's attention to "bitmill" and leaves a forward hook that tells a packed cache of
    padding and does nothing without one; `model.set_attn_implementation("sdpa")` gives back the attention.

    Raises UsageError for models whose layers it does not know, and for methods that lack their calibration;
    CheckpointError for a calibration that is not of this model, or damaged.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | KVMethod | None = None,
        *,
        calibration: KVCalibration | None = None,
        cache_decoded: bool = False,
        **options: Any,
    ) -> None:
        self.method, self.calibration = chosen_method(model, method, calibration, options)
        if self.calibration is not None:
            self.calibration.check(packed_shapes(model))
        scheme = self.method.scheme()
        config: Any = model.config
        reader = config.get_text_config(decoder=True) if attach(model) else None
        layers: list[Any] = list(DynamicCache(config=config).layers)
        for number, layer in enumerate(layers):
            window = getattr(layer, "sliding_window", None)
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                continue  # states of another kind stay as transformers has them
            calibrated = _NONE if self.calibration is None else self.calibration.layers[number]
            rope = rope_for(model, scheme, number)
            layers[number] = QuantizedLayer(scheme, calibrated, rope, window, reader, cache_decoded)
        super().__init__(layers=layers)
        self._stepping: DecodeStepCache | None = None
        if not self.packed_layers:
            raise UsageError(f"{type(model).__name__} has no layer with keys and values that could be packed.")
        _note_padding(model)

    def __getstate__(self) -> dict[str, Any]:
        """Copies look at their own layers."""
        return {**vars(self), "_stepping": None}

    def decode_step_cache(self) -> DecodeStepCache:
        """The layers as the compiled step of a model takes them (bitmill.runtime.decode)."""
        if self._stepping is None or self._stepping.layers is not self.layers:
            self._stepping = DecodeStepCache(self.layers)
        return self._stepping

    @property
    def packed_layers(self) -> list[QuantizedLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    @property
    def unsupported_reason(self) -> str | None:
        """None where a kernel attends to packed layers as they lie, or one sentence on why they are decoded."""
        return next((reason for layer in self.packed_layers if (reason := layer.unsupported_reason)), None)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all packed layers: everything that is allocated for tokens."""
        return sum(layer.allocated_bytes for layer in self.packed_layers)

    @property
    def table_bytes(self) -> int:
        """What calibration found, for all caches of the model together: no part of allocated_bytes."""
        return 0 if self.calibration is None else self.calibration.bytes

    @property
    def bits_per_element(self) -> float:
        """Allocated bits over the numbers of an ordinary cache of the same tokens."""
        elements = sum(layer.elements for layer in self.packed_layers)
        return 8 * self.allocated_bytes / elements if elements else 0.0

    def take(self, cache: Cache, mask: Tensor | None = None) -> QuantizedCache:
        """Pack the keys and values of an ordinary cache; returns itself, which must be empty.

        mask: (rows, tokens), 0 where there is padding on the left.  States of other kinds are shared, not copied.
        """
        if mask is not None:
            self.pad(mask)
        for number, source in enumerate(cache.layers):
            states: Any = source
            layer = self.layers[number]
            if not isinstance(layer, QuantizedLayer):
                self.layers[number] = source
            elif states.is_initialized and states.keys is not None and states.values is not None:
                layer.lazy_initialization(states.keys, states.values)
                layer.skip(states.get_seq_length() - states.keys.shape[-2])
                layer.append(states.keys, states.values)
        return self

    def save(self, path: str | Path) -> Path:
        """Write the cache to a file of safetensors; returns its path.

        Raises UsageError for a cache that holds states of another kind than keys and values.
        """
        if len(self.packed_layers) != len(self.layers):
            raise UsageError("The model has layers without keys and values, whose states cannot be saved.")
        write_cache(Path(path), self.method, self.calibration, self.packed_layers)
        return Path(path)

    @classmethod
    def load(cls, model: nn.Module, path: str | Path) -> QuantizedCache:
        """The cache that `save` wrote, for the same model. Raises CheckpointError for another file or model."""
        saved = SavedCache(Path(path))
        cache = cls(model, saved.method, calibration=saved.calibration)
        if len(saved.places) != len(cache.layers):
            raise CheckpointError(
                f"{path} has {len(saved.places)} layers and the model {len(cache.layers)}; "
                "load it with the model it was made by."
            )
        shapes = packed_shapes(model)
        for number, layer in enumerate(cache.packed_layers):
            saved.restore(number, layer, shapes[number], next(model.parameters()).device)
        return cache

    def pad(self, mask: Tensor) -> None:
        """Tell where sequences begin: mask (rows, tokens), 0 where there is padding on the left."""
        width = mask.shape[1]
        start: Tensor | None = None
        for layer in self.packed_layers:
            if not layer.has_begun:
                if start is None:
                    real = mask.to(torch.int64)
                    start = torch.where(real.any(-1), real.argmax(-1), width)
                layer.begin(start)


def chosen_method(
    model: nn.Module, method: str | KVMethod | None, calibration: KVCalibration | None, options: dict[str, Any]
) -> tuple[KVMethod, KVCalibration | None]:
    """The method, and its calibration where it needs one."""
    folder = getattr(model, "name_or_path", "") or ""
    if calibration is None:
        calibration = read_calibration(Path(folder)) if folder else None
    if method is None:
        if calibration is None:
            raise UsageError(
                "Which KV method is not said, and the model's folder has no calibration; give method=..."
            )
        method = calibration.method
    chosen = method if isinstance(method, KVMethod) else kv_method(method, **options)
    if not chosen.scheme().is_calibrated:
        return chosen, None
    if calibration is None or calibration.method != chosen:
        have = "none" if calibration is None else f"one for {describe(calibration.method)}"
        raise UsageError(
            f"{describe(chosen)} needs a calibration and there is {have}; "
            f"make one by {calibration_command(chosen, folder or 'MODEL', calibration)}."
        )
    return chosen, calibration


_noted: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _note_padding(model: nn.Module) -> None:
    """Have the model's calls tell a packed cache where sequences begin."""
    if model in _noted:
        return
    _noted.add(model)
    model.register_forward_pre_hook(_pad, with_kwargs=True)


def _pad(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = cache_argument(kwargs)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(cache, QuantizedCache) and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] > 0:
        cache.pad(mask)
