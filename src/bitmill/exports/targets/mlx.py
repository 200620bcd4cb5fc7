"""MLX's checkpoints (affine), as mlx-lm reads them on Apple silicon, and on Linux without its speed.

    weight   uint32 (out, in * bits / 32): codes, dense, the first in the lowest bits
    scales   (out, in / g)
    biases   (out, in / g), with W = scales * code + biases

Integer zeros become biases -scale * zero, in fp16 where that is exact and in fp32 otherwise.

Source: mlx.core.quantize of version 0.32; mlx_lm/utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.exports.base import TARGETS, Layer, Target
from bitmill.exports.integers import grid, integers
from bitmill.formats.affine import Affine
from bitmill.formats.quantized import Quantized
from bitmill.numerics.packing import pack, unpack

_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@TARGETS.register("mlx")
class MLXTarget(Target):
    """Evenly spaced levels of 2 to 8 bits in groups of 32, 64 or 128, mixed in one model."""

    name: ClassVar[str] = "mlx"
    readers: ClassVar[str] = "mlx-lm"

    def unsupported_reason(self, layer: Layer) -> str | None:
        """Return why MLX cannot hold a layer."""
        if not isinstance(layer.format, Affine):
            found = grid(layer)
            if isinstance(found, str):
                return found
        bits, group = _kind(layer)
        if bits not in _BITS:
            return f"it has {bits} bits, and mlx holds 2, 3, 4, 5, 6 and 8; use --to compressed-tensors"
        if group not in _GROUPS or layer.shape[1] % group:
            return (
                f"it has groups of {group} of {layer.shape[1]} columns, and mlx holds whole ones of 32, 64 and 128"
            )
        return None

    def tensors(self, quantized: Quantized) -> dict[str, Tensor]:
        """Return weight, scales and biases."""
        bits, _ = _kind(Layer(quantized.format, quantized.shape))
        if isinstance(quantized.format, Affine):
            scales, biases = quantized.params["scale"], quantized.params["offset"]
        else:
            matrix = integers(quantized)
            scales, biases = matrix.scale.float(), -matrix.scale.float() * matrix.zero
        exact = all(torch.equal(part.half().float(), part) for part in (scales, biases))
        dtype = torch.float16 if exact else torch.float32
        return {
            "weight": pack(quantized.codes, bits).view(torch.uint32),
            "scales": scales.to(dtype),
            "biases": biases.to(dtype),
        }

    def decode(self, tensors: dict[str, Tensor], layer: Layer) -> Tensor:
        """Return scales * code + biases."""
        bits, group = _kind(layer)
        codes = unpack(tensors["weight"].view(torch.int32), bits, layer.shape[1]).float().unflatten(1, (-1, group))
        scales, biases = (tensors[name].float()[..., None] for name in ("scales", "biases"))
        return (codes * scales + biases).flatten(1)

    def config(self, layers: Mapping[str, Layer], floats: Sequence[str]) -> dict[str, Any]:
        """Return the bits and groups of most layers, and those of the others by name."""
        kinds = {name: _kind(layer) for name, layer in layers.items()}
        common = max(kinds.values(), key=list(kinds.values()).count)
        others = {name: _described(*kind) for name, kind in kinds.items() if kind != common}
        return {**_described(*common), **others}

    def config_entries(self, described: dict[str, Any]) -> dict[str, Any]:
        """Return the config under both of its keys."""
        return {"quantization": described, "quantization_config": described}


def _kind(layer: Layer) -> tuple[int, int]:
    """Return bits and columns of a group."""
    format = layer.format.core
    return format.bits, format.width(layer.shape)


def _described(bits: int, group: int) -> dict[str, Any]:
    return {"group_size": group, "bits": bits, "mode": "affine"}
