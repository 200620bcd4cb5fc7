"""compressed-tensors, as vLLM, SGLang and transformers read it: packed integers, and integers with rounded inputs.

Of a linear layer (out, in) with groups of g columns, `pack-quantized`:

    weight_packed      int32 (out, ceil(in * bits / 32)): codes, dense, the first in the lowest bits
    weight_scale       fp16 (out, in / g)
    weight_shape       int64 (2): out and in
    weight_zero_point  int32 (ceil(out * bits / 32), in / g): zeros packed along the outputs; absent when symmetric

and `int-quantized` for 8 bits with 8-bit inputs, a scale a token:

    weight        int8 (out, in): codes less 128
    weight_scale  fp32 (out, 1)

Source: compressed_tensors/compressors and quantization/quant_args.py of version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.exports.base import TARGETS, Layer, Target
from bitmill.exports.integers import Integers, decode_integers, grid, integers, known_grid
from bitmill.formats.quantized import Quantized
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.numerics.packing import pack, unpack

_VERSION = "0.17.0"  # the first with dense packing


@TARGETS.register("compressed-tensors")
class CompressedTensors(Target):
    """Integers of 1 to 8 bits, and 8 bits with 8-bit inputs of a scale a token."""

    name: ClassVar[str] = "compressed-tensors"
    readers: ClassVar[str] = "vLLM, SGLang, and transformers with compressed-tensors"

    def unsupported_reason(self, layer: Layer) -> str | None:
        """Return why compressed-tensors cannot hold a layer."""
        format = layer.format
        if not isinstance(format, QuantizedInputs):
            found = grid(layer)
            return found if isinstance(found, str) else None
        found, inputs = grid(Layer(format.inner, layer.shape)), format.inputs
        if isinstance(found, str):
            return found
        per_token = (
            isinstance(inputs, Uniform) and inputs.symmetric and (inputs.bits, inputs.group_size) == (8, "row")
        )
        if not per_token or format.static or format.threshold or format.search:
            return "its inputs are rounded in another way than in 8 bits with one scale a token"
        if not (found.bits == 8 and found.symmetric and found.per_row):
            return "its inputs are rounded, and its weights are not symmetric ones of 8 bits with a scale a row"
        return None

    def notes(self, layers: Mapping[str, Layer]) -> list[str]:
        """Return how transformers reads zeros."""
        plain = [layer for layer in layers.values() if not isinstance(layer.format, QuantizedInputs)]
        if all(known_grid(layer).symmetric for layer in plain):
            return []
        return [
            "transformers reads codes with zeros as from_pretrained(..., quantization_config="
            "CompressedTensorsConfig(dequantize=True)) alone; vLLM reads them packed."
        ]

    def tensors(self, quantized: Quantized) -> dict[str, Tensor]:
        """Return the tensors of `pack-quantized` or `int-quantized`."""
        format, shape = quantized.format, quantized.shape
        if isinstance(format, QuantizedInputs):
            inner = Quantized(format.inner, quantized.codes, quantized.params, shape)
            matrix = integers(inner)
            return {
                "weight": (matrix.codes.to(torch.int16) - 128).to(torch.int8),
                "weight_scale": matrix.scale.float(),
            }
        matrix, found = integers(quantized), known_grid(Layer(format, shape))
        tensors = {
            "weight_packed": pack(matrix.codes, found.bits),
            "weight_scale": matrix.scale,
            "weight_shape": torch.tensor(shape, dtype=torch.int64),
        }
        if not found.symmetric:
            tensors["weight_zero_point"] = pack(matrix.zero.T.contiguous(), found.bits).T.contiguous()
        return tensors

    def decode(self, tensors: dict[str, Tensor], layer: Layer) -> Tensor:
        """Return scale * (code - zero)."""
        if "weight" in tensors:
            return tensors["weight"].float() * tensors["weight_scale"]
        found = known_grid(layer)
        codes, scale = unpack(tensors["weight_packed"], found.bits, layer.shape[1]), tensors["weight_scale"]
        zero = torch.full(scale.shape, 1 << (found.bits - 1))
        if not found.symmetric:
            packed = tensors["weight_zero_point"].T.contiguous()
            zero = unpack(packed, found.bits, layer.shape[0]).to(torch.int64).T
        return decode_integers(Integers(codes, scale, zero))

    def config(self, layers: Mapping[str, Layer], floats: Sequence[str]) -> dict[str, Any]:
        """Return the config: a group for every kind of layer."""
        kinds: dict[tuple[str, ...], list[str]] = {}
        schemes: dict[tuple[str, ...], dict[str, Any]] = {}
        for name, layer in layers.items():
            scheme = _scheme(layer)
            key = tuple(str(part) for part in (scheme["format"], scheme["weights"], scheme["input_activations"]))
            kinds.setdefault(key, []).append(name)
            schemes[key] = scheme
        groups = {}
        for number, (key, names) in enumerate(kinds.items()):
            targets = ["Linear"] if len(kinds) == 1 else names
            groups[f"group_{number}"] = {"targets": targets, **schemes[key]}
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "version": _VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(floats),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
            "config_groups": groups,
        }


def _scheme(layer: Layer) -> dict[str, Any]:
    """Return a group of the config without its targets."""
    format = layer.format
    rounded = isinstance(format, QuantizedInputs)
    found = known_grid(Layer(format.inner, layer.shape) if isinstance(format, QuantizedInputs) else layer)
    strategy = {"strategy": "channel"} if found.per_row else {"strategy": "group", "group_size": found.group}
    weights = {"num_bits": found.bits, "type": "int", "symmetric": found.symmetric, **strategy, "dynamic": False}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "format": "int-quantized" if rounded else "pack-quantized",
        "weights": weights,
        "input_activations": token if rounded else None,
        "output_activations": None,
    }
