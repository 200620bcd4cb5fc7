"""A packed cache as a file of safetensors: pages as they are, and what they are decoded with.

Its tensors are layers.N.pages (rows, pages, words), .loose and .start (see bitmill.kv.buffer), and those of the
calibration; its metadata are the method, and for each layer the length, the first slot and the shape of heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitmill.errors import CheckpointError
from bitmill.kv.calibration_file import KVCalibration, calibrated_layers
from bitmill.kv.layer import QuantizedLayer
from bitmill.kv.page import PageLayout
from bitmill.kv.scheme import KV_METHODS, PAGE, KVMethod

_META = "bitmill_kv_cache"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def write_cache(
    path: Path, method: KVMethod, calibration: KVCalibration | None, layers: list[QuantizedLayer]
) -> None:
    """Write a cache's layers to a file."""
    tensors = {} if calibration is None else calibration.tensors()
    places: list[dict[str, Any] | None] = []
    for number, layer in enumerate(layers):
        if not layer.is_initialized or layer.start is None:
            places.append(None)
            continue
        tensors[f"layers.{number}.pages"] = layer.pages.used()
        tensors[f"layers.{number}.loose"] = layer.fp16_buffer
        tensors[f"layers.{number}.start"] = layer.start.contiguous()
        dtype = str(layer.dtype).removeprefix("torch.")
        places.append(
            {
                "length": layer.length,
                "first": layer.pages.first,
                "heads": layer.heads,
                "dim": layer.dim,
                "dtype": dtype,
            }
        )
    about = {} if calibration is None else calibration.about
    meta = {"method": method.to_dict(), "calibrated": calibration is not None, "about": about}
    meta |= {"layers": places}
    save_file(tensors, path, metadata={_META: json.dumps(meta)})


class SavedCache:
    """What `write_cache` wrote; method and calibration are the cache's. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})[_META])
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.method: KVMethod = KV_METHODS.from_dict(meta["method"])
            self.places = list(meta["layers"])
            found = calibrated_layers(self._tensors, len(self.places))
            self.calibration = KVCalibration(self.method, found, meta["about"]) if meta["calibrated"] else None
        except Exception as error:  # safetensors and json raise all sorts
            raise CheckpointError(f"{path} cannot be read as a packed cache ({error}); save it again.") from error

    def restore(self, number: int, layer: QuantizedLayer, shape: tuple[int, int], device: torch.device) -> None:
        """Give a fresh layer the tokens of layer `number`, whose keys and values have the shape (heads, dim).

        Raises CheckpointError where they do not fit.
        """
        if self.places[number] is None:
            return
        place = self._place(number, shape)
        pages, fp16_buffer, start = (self._part(number, name, device) for name in ("pages", "loose", "start"))
        if fp16_buffer.dim() == 5 and fp16_buffer.shape[1]:
            layer.open(fp16_buffer.shape[1], *shape, device)
        fits = (
            layer.store is not None
            and fp16_buffer.shape == layer.fp16_buffer.shape
            and fp16_buffer.dtype == torch.float16
        )
        fits = fits and pages.dim() == 3 and pages.dtype == start.dtype == torch.int32
        fits = fits and start.shape == fp16_buffer.shape[1:2] == pages.shape[:1] and bool((start >= 0).all())
        if not fits or pages.shape[-1] != layer.pages.layout.words:
            raise CheckpointError(f"Layer {number} of {self.path} has another shape; save the cache again.")
        layer.length = place["length"]
        num_unpacked = layer.length - place["first"] - PAGE * pages.shape[1]
        # before `first` nothing is left, and a layer looks back as far as its window
        in_sight = place["first"] % PAGE == 0 and 0 <= place["first"] <= layer.first_for(0)
        if not in_sight or not 0 <= num_unpacked <= layer.scheme.tail:
            raise CheckpointError(
                f"Layer {number} of {self.path} says that it has the tokens from {place['first']} to "
                f"{layer.length}, and its pages say otherwise; save the cache again."
            )
        if (beyond := _beyond(layer.pages.layout, pages)) is not None:
            raise CheckpointError(
                f"Layer {number} of {self.path} has an outlier in channel {beyond}, and "
                f"{layer.heads * layer.dim} channels; save the cache again."
            )
        layer.begin(start)
        layer.fp16_buffer.copy_(fp16_buffer)
        layer.pages.put(pages, place["first"])
        layer.dtype, layer.is_initialized = _DTYPES[place["dtype"]], True

    def _place(self, number: int, shape: tuple[int, int]) -> dict[str, Any]:
        """What the metadata say of a layer."""
        place = self.places[number]
        numbers = (
            [place.get(key) for key in ("length", "first", "heads", "dim")] if isinstance(place, dict) else []
        )
        if not numbers or any(type(n) is not int for n in numbers) or str(place.get("dtype")) not in _DTYPES:
            raise CheckpointError(f"Layer {number} of {self.path} is said to be {place!r}; save the cache again.")
        if (place["heads"], place["dim"]) != shape:
            raise CheckpointError(
                f"Layer {number} of {self.path} has {place['heads']} heads of {place['dim']} numbers and the "
                f"model's {shape[0]} of {shape[1]}; load it with the model it was made by."
            )
        return place

    def _part(self, number: int, name: str, device: torch.device) -> Tensor:
        try:
            return self._tensors[f"layers.{number}.{name}"].to(device)
        except KeyError as error:
            raise CheckpointError(f"{self.path} has no {name} of layer {number}; save the cache again.") from error


def _beyond(layout: PageLayout, pages: Tensor) -> int | None:
    """A channel that an outlier of pages (rows, pages, words) names and the layer does not have, or None."""
    for side in ("key", "value"):
        part = layout.parts.get(f"{side}.outlier_index")
        if part is not None and pages.numel():
            most = int(part.of(pages).to(torch.int32).amax())
            if most >= layout.heads * layout.dim:
                return most
    return None
