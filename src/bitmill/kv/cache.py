"""Packed KV cache for any decoder of transformers, and the file it is saved to.

The file is in safetensors format: tensors layers.N.pages (rows, pages, words), .loose and .start (the fp16
buffer and the starts of a `TokenBuffer`), and those of the calibration; metadata with the method, for each layer
its length, first slot and shape, and the digest of all of this.
"""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bitmill.compat import cache_argument, forward_with_cache
from bitmill.config.paths import user_path
from bitmill.errors import CheckpointError, UsageError
from bitmill.evaluation.logits import Output
from bitmill.kv.attention import attach_attention
from bitmill.kv.calibration_file import KVCalibration, load_calibration, matching_calibration, params_by_layer
from bitmill.kv.codec import CalibratedParams
from bitmill.kv.decode_step import DecodeStepCache
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.rope import rope_to_undo
from bitmill.kv.scheme import KV_METHODS, PAGE, KVMethod, kv_method
from bitmill.kv.size import packed_shapes
from bitmill.models.split import SplitModel, split_model
from bitmill.recorded_tensors import read_recorded, write_recorded

_META = "bitmill_kv_cache"
_VERSION = 2
_UNRECORDED = ("method", "calibrated", "about", "layers")  # metadata of version 1, which had no digest
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_UNCALIBRATED = (CalibratedParams(), CalibratedParams())


class QuantizedCache(Cache):
    """Packed keys and values of a model's sequences; pass it to the model as `past_key_values`.

    Creating one sets the model's attention to "bitmill" and registers a forward pre-hook that informs packed
    caches of padding and does nothing without one; `model.set_attn_implementation("sdpa")` restores the
    attention.

    Args:
        model: the model the cache is for, with float or quantized weights.
        method: KV method or its name; None for the one that the model's folder was calibrated for.
        calibration: calibration of the method, if it needs one; None for that of the model's folder.
        cache_decoded: keep decoded pages, for callers that read all tokens again and again and have the memory.
        options: options of the method, such as bits=3.

    Raises:
        UsageError: the model has no layers that can be packed, or the method lacks its calibration.
        CheckpointError: the calibration is of another model, or damaged.
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
        self.method, self.calibration = _choose_method(model, method, calibration, options)
        if self.calibration is not None:
            self.calibration.check(packed_shapes(model))
        config: Any = model.config
        direct_config = config.get_text_config(decoder=True) if attach_attention(model) else None
        layers: list[Any] = list(DynamicCache(config=config).layers)
        self.method.check_layers(len(layers))
        for number, layer in enumerate(layers):
            window = getattr(layer, "sliding_window", None)
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                continue  # states of another kind stay as transformers has them
            params = _UNCALIBRATED if self.calibration is None else self.calibration.layers[number]
            scheme = self.method.layer_scheme(number)
            rope = rope_to_undo(model, scheme, number)
            layers[number] = QuantizedLayer(scheme, params, rope, window, direct_config, cache_decoded)
        super().__init__(layers=layers)
        self._decode_step_cache: DecodeStepCache | None = None
        if not self.packed_layers:
            raise UsageError(f"{type(model).__name__} has no layer with keys and values that could be packed.")
        _register_padding_hook(model)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, whose decode step reads its own layers."""
        return {**vars(self), "_decode_step_cache": None}

    def decode_step_cache(self) -> DecodeStepCache:
        """Return the layers as the compiled step of a model takes them (bitmill.runtime.decode)."""
        if self._decode_step_cache is None or self._decode_step_cache.layers is not self.layers:
            self._decode_step_cache = DecodeStepCache(self.layers)
        return self._decode_step_cache

    @property
    def packed_layers(self) -> list[QuantizedLayer]:
        """Return the layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    @property
    def unsupported_reason(self) -> str | None:
        """Return None if a kernel reads all packed layers, else a sentence on why one is decoded."""
        return next((reason for layer in self.packed_layers if (reason := layer.unsupported_reason)), None)

    @property
    def why_not(self) -> str | None:
        """Return `unsupported_reason`; the former name, kept for one release."""
        warnings.warn("why_not is now unsupported_reason", DeprecationWarning, stacklevel=2)
        return self.unsupported_reason

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes allocated for the tokens of all packed layers."""
        return sum(layer.allocated_bytes for layer in self.packed_layers)

    @property
    def table_bytes(self) -> int:
        """Return the bytes of the calibration, shared by all caches of the model; no part of allocated_bytes."""
        return 0 if self.calibration is None else self.calibration.bytes

    @property
    def bits_per_element(self) -> float:
        """Return the allocated bits per number of an ordinary cache of these tokens."""
        elements = sum(layer.elements for layer in self.packed_layers)
        return 8 * self.allocated_bytes / elements if elements else 0.0

    def take(self, cache: Cache, mask: Tensor | None = None) -> QuantizedCache:
        """Pack the keys and values of an ordinary cache into this one, which must be empty.

        Args:
            cache: of the model; its states of other kinds are shared, not copied.
            mask: (rows, tokens), 0 where there is padding on the left.

        Returns:
            This cache.
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
                layer.buffer.skip_to(states.get_seq_length() - states.keys.shape[-2])
                layer.append(states.keys, states.values)
        return self

    def save(self, path: str | Path) -> Path:
        """Write the cache to a safetensors file; return its path.

        Raises:
            UsageError: the cache holds states of another kind than keys and values.
        """
        if len(self.packed_layers) != len(self.layers):
            raise UsageError("The model has layers without keys and values, whose states cannot be saved.")
        file = user_path(path)
        _write_cache(file, self.method, self.calibration, self.packed_layers)
        return file

    @classmethod
    def load(cls, model: nn.Module, path: str | Path) -> QuantizedCache:
        """Return the cache in a file that `save` wrote.

        Args:
            model: the model the cache was saved with.
            path: of the file.

        Raises:
            CheckpointError: the file is damaged, or of another model.
        """
        saved = _SavedCache(user_path(path))
        cache = cls(model, saved.method, calibration=saved.calibration)
        if len(saved.layers) != len(cache.layers):
            raise CheckpointError(
                f"{path} has {len(saved.layers)} layers and the model {len(cache.layers)}; "
                "load it with the model it was made by."
            )
        shapes = packed_shapes(model)
        for number, layer in enumerate(cache.packed_layers):
            saved.restore(number, layer, shapes[number], next(model.parameters()).device)
        return cache

    def pad(self, mask: Tensor) -> None:
        """Set where sequences begin; layers that have tokens ignore it.

        Args:
            mask: (rows, tokens), 0 where there is padding on the left.
        """
        width = mask.shape[1]
        start: Tensor | None = None
        for layer in self.packed_layers:
            if not layer.buffer.has_tokens:
                if start is None:
                    real = mask.to(torch.int64)
                    start = torch.where(real.any(-1), real.argmax(-1), width)
                layer.buffer.set_start(start)


def _choose_method(
    model: nn.Module, method: str | KVMethod | None, calibration: KVCalibration | None, options: dict[str, Any]
) -> tuple[KVMethod, KVCalibration | None]:
    """Return the method, and its calibration if it needs one."""
    if calibration is None:
        calibration = load_calibration(model)
    if method is None:
        if calibration is None:
            raise UsageError("No KV method is given, and the model's folder has no calibration; give method=...")
        method = calibration.method
    chosen = method if isinstance(method, KVMethod) else kv_method(method, **options)
    return chosen, matching_calibration(chosen, calibration, getattr(model, "name_or_path", "") or "MODEL")


_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _register_padding_hook(model: nn.Module) -> None:
    """Have the model's calls inform a packed cache where sequences begin."""
    if model in _hooked:
        return
    _hooked.add(model)
    model.register_forward_pre_hook(_pad, with_kwargs=True)


def _pad(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = cache_argument(kwargs)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(cache, QuantizedCache) and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] > 0:
        cache.pad(mask)


class PackedForward:
    """Callable from tokens (windows, length) to their logits, through a fresh packed cache.

    Windows are read a page of tokens at a time: a token attends to earlier pages packed and to its own page in
    fp16, exactly as when the text is generated token by token.

    Args:
        model: a decoder.
        method: KV method.
        calibration: of the method, if it needs one.

    Attributes:
        bits_per_element, bytes, table_bytes: of the cache after the last windows.
    """

    def __init__(self, model: nn.Module, method: KVMethod, calibration: KVCalibration | None) -> None:
        self.model, self.method, self.calibration = model, method, calibration
        self.bits_per_element, self.bytes, self.table_bytes = 0.0, 0, 0
        self._split: tuple[SplitModel | None] | None = None  # None until the first call

    def __call__(self, tokens: Tensor) -> Output:
        """Return the logits, which are computed when they are read unless the model cannot be split."""
        if self._split is None:
            self._split = (split_model(self.model, tokens),)
        cache = QuantizedCache(self.model, self.method, calibration=self.calibration, cache_decoded=True)
        (split,), pages = self._split, tokens.split(PAGE, 1)
        if split is None:
            output: Output = torch.cat(
                [forward_with_cache(self.model, page, cache)[0].logits for page in pages], 1
            )
        else:
            hidden = [split.run(partial(forward_with_cache, self.model, page, cache)) for page in pages]
            output = split.logits(torch.cat(hidden, 1))
        self.bits_per_element, self.bytes = cache.bits_per_element, cache.allocated_bytes
        self.table_bytes = cache.table_bytes
        return output


def _write_cache(
    path: Path, method: KVMethod, calibration: KVCalibration | None, layers: list[QuantizedLayer]
) -> None:
    tensors = {} if calibration is None else calibration.tensors()
    entries: list[dict[str, Any] | None] = []
    for number, layer in enumerate(layers):
        buffer = layer.buffer
        if not layer.is_initialized or buffer.start is None:
            entries.append(None)
            continue
        tensors[f"layers.{number}.pages"] = buffer.pages.used_pages()
        tensors[f"layers.{number}.loose"] = buffer.fp16_buffer
        tensors[f"layers.{number}.start"] = buffer.start.contiguous()
        entries.append(
            {
                "length": layer.length,
                "first": buffer.pages.first,
                "heads": buffer.heads,
                "dim": buffer.dim,
                "dtype": str(layer.dtype).removeprefix("torch."),
            }
        )
    about = {} if calibration is None else calibration.about
    meta = {"method": method.to_dict(), "calibrated": calibration is not None, "about": about}
    meta |= {"layers": entries, "version": _VERSION}
    write_recorded(path, _META, tensors, meta)


class _SavedCache:
    """A file that `_write_cache` wrote.

    Attributes:
        method, calibration: of the cache.
        layers: metadata of each layer, None for an empty one.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # a FIFO would block
            raise CheckpointError(f"There is no saved cache at {path}; save it again.")
        try:
            self._tensors, meta = read_recorded(path, _META, _UNRECORDED)
            self.method: KVMethod = KV_METHODS.from_dict(meta["method"])
            self.layers = list(meta["layers"])
            params = params_by_layer(self._tensors, len(self.layers))
            self.calibration = KVCalibration(self.method, params, meta["about"]) if meta["calibrated"] else None
        except Exception as error:  # safetensors and json raise many types
            raise CheckpointError(f"{path} cannot be read as a packed cache ({error}); save it again.") from error

    def restore(self, number: int, layer: QuantizedLayer, shape: tuple[int, int], device: torch.device) -> None:
        """Fill an empty layer with the saved tokens of a layer.

        Args:
            number: layer index.
            layer: to fill.
            shape: (heads, head dimension) of the model's layer.
            device: of the model.

        Raises:
            CheckpointError: the saved tensors or metadata do not fit the layer, or contradict each other.
        """
        if self.layers[number] is None:
            return
        entry = self._entry(number, shape)
        pages, fp16_buffer, start = (self._tensor(number, name, device) for name in ("pages", "loose", "start"))
        if fp16_buffer.dim() == 5 and fp16_buffer.shape[1]:
            layer.buffer.allocate(fp16_buffer.shape[1], *shape, device)
        if not _fits(layer, pages, fp16_buffer, start):
            raise CheckpointError(f"Layer {number} of {self.path} has another shape; save the cache again.")
        length, first = entry["length"], entry["first"]
        layer.buffer.length = length
        unpacked = length - first - PAGE * pages.shape[1]
        # the tokens before `first` were freed, and a layer reads back as far as its window
        is_visible = first % PAGE == 0 and 0 <= first <= layer.first_visible(0)
        if not is_visible or not 0 <= unpacked <= layer.scheme.buffer_size:
            raise CheckpointError(
                f"Layer {number} of {self.path} has the tokens {first} to {length} by its metadata, which "
                "contradicts its pages; save the cache again."
            )
        layout = layer.buffer.pages.layout
        if (channel := layout.invalid_outlier_channel(pages)) is not None:
            raise CheckpointError(
                f"Layer {number} of {self.path} has an outlier in channel {channel}, and "
                f"{layout.heads * layout.dim} channels; save the cache again."
            )
        layer.restore(_DTYPES[entry["dtype"]], pages, fp16_buffer, start, length, first)

    def _entry(self, number: int, shape: tuple[int, int]) -> dict[str, Any]:
        """Return the metadata of a layer, checked."""
        entry = self.layers[number]
        numbers = (
            [entry.get(key) for key in ("length", "first", "heads", "dim")] if isinstance(entry, dict) else []
        )
        if not numbers or any(type(n) is not int for n in numbers) or str(entry.get("dtype")) not in _DTYPES:
            raise CheckpointError(
                f"Layer {number} of {self.path} has the metadata {entry!r}; save the cache again."
            )
        if (entry["heads"], entry["dim"]) != shape:
            raise CheckpointError(
                f"Layer {number} of {self.path} has {entry['heads']} heads of {entry['dim']} numbers and the "
                f"model's {shape[0]} of {shape[1]}; load it with the model it was made by."
            )
        return entry

    def _tensor(self, number: int, name: str, device: torch.device) -> Tensor:
        try:
            return self._tensors[f"layers.{number}.{name}"].to(device)
        except KeyError as error:
            raise CheckpointError(f"{self.path} has no {name} of layer {number}; save the cache again.") from error


def _fits(layer: QuantizedLayer, pages: Tensor, fp16_buffer: Tensor, start: Tensor) -> bool:
    """Return True if saved tensors have the types and shapes of an allocated layer."""
    buffer = layer.buffer
    return (
        buffer.store is not None
        and fp16_buffer.shape == buffer.fp16_buffer.shape
        and fp16_buffer.dtype == torch.float16
        and pages.dim() == 3
        and pages.dtype == start.dtype == torch.int32
        and start.shape == fp16_buffer.shape[1:2] == pages.shape[:1]
        and bool((start >= 0).all())
        and pages.shape[-1] == buffer.pages.layout.words
    )
