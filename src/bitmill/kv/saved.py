"""A packed cache as a file of safetensors: pages as they are, and what they are decoded with.

Its tensors are layers.N.pages (rows, pages, words), .loose and .start (see bitmill.kv.tokens), and those of the
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
from bitmill.kv.base import KV_METHODS, KVMethod
from bitmill.kv.calibrated import Calibration, calibrated_layers
from bitmill.kv.layer import QuantizedLayer

_META = "bitmill_kv_cache"


def write_cache(
    path: Path, method: KVMethod, calibration: Calibration | None, layers: list[QuantizedLayer]
) -> None:
    """Write a cache's layers to a file."""
    tensors = {} if calibration is None else calibration.tensors()
    places: list[dict[str, Any] | None] = []
    for number, layer in enumerate(layers):
        if not layer.is_initialized or layer.start is None:
            places.append(None)
            continue
        tensors[f"layers.{number}.pages"] = layer.pages.used()
        tensors[f"layers.{number}.loose"] = layer.loose
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
            self.calibration = Calibration(self.method, found, meta["about"]) if meta["calibrated"] else None
        except Exception as error:  # safetensors and json raise all sorts
            raise CheckpointError(f"{path} cannot be read as a packed cache ({error}); save it again.") from error

    def restore(self, number: int, layer: QuantizedLayer, device: torch.device) -> None:
        """Give a fresh layer the tokens of layer `number`. Raises CheckpointError where they do not fit."""
        place = self.places[number]
        if place is None:
            return
        pages, loose, start = (self._part(number, name, device) for name in ("pages", "loose", "start"))
        layer.open(loose.shape[1], place["heads"], place["dim"], device)
        fits = pages.shape[-1] == layer.pages.layout.words and loose.shape == layer.loose.shape
        if not fits or start.shape != loose.shape[1:2]:
            raise CheckpointError(f"Layer {number} of {self.path} has another shape; save the cache again.")
        layer.begin(start)
        layer.loose.copy_(loose)
        layer.pages.put(pages, place["first"])
        layer.length, layer.dtype, layer.is_initialized = place["length"], getattr(torch, place["dtype"]), True

    def _part(self, number: int, name: str, device: torch.device) -> Tensor:
        try:
            return self._tensors[f"layers.{number}.{name}"].to(device)
        except KeyError as error:
            raise CheckpointError(f"{self.path} has no {name} of layer {number}; save the cache again.") from error
