"""compressed-tensors, as llm-compressor writes it: packed integers, integers and floats of 8 bits, NVFP4, MXFP4.

    pack-quantized         weight_packed, weight_scale, weight_shape, weight_zero_point, weight_g_idx
    int-quantized          weight int8, weight_scale, weight_zero_point
    float-quantized        weight e4m3, weight_scale of the tensor, of rows, or of blocks
    nvfp4-pack-quantized   weight_packed uint8 (two codes a byte), weight_scale e4m3, weight_global_scale divides
    mxfp4-pack-quantized   weight_packed uint8, weight_scale: powers of two

A layer's scheme is the group of the config whose targets name it, by name, by a pattern, or by class.

Source: compressed_tensors/compressors and quantization/quant_args.py of versions 0.10 to 0.20. Codes of bits that
do not divide 32 are dense since 0.17; before, a word held only whole codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.errors import SourceError
from bitmill.formats.float import Float
from bitmill.formats.quantized import Quantized
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.imports.base import IMPORTERS, Importer, checked, needed
from bitmill.imports.four_bits import mxfp4, nvfp4
from bitmill.imports.matrices import group_order, in_order
from bitmill.imports.small_floats import fp8
from bitmill.numerics.packing import unpack, words_for

_DENSE_SINCE = (0, 17)


@IMPORTERS.register("compressed-tensors")
class CompressedTensorsImporter(Importer):
    """Every format of linear layers but sparse ones."""

    name: ClassVar[str] = "compressed-tensors"
    marker: ClassVar[str] = "weight_scale"
    reads: ClassVar[frozenset[str]] = frozenset(
        ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
         "weight_global_scale")
    )  # fmt: skip
    passes_over: ClassVar[frozenset[str]] = frozenset(
        ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale")
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if config.get("transform_config"):
            raise SourceError("The checkpoint rotates inputs (transform_config), which is not read yet.")
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise SourceError("The checkpoint is sparse (sparsity_config), which is not read.")
        self.groups = list((config.get("config_groups") or {}).values())
        if not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in self.groups):
            raise SourceError("The config's config_groups hold no weights; fetch the model again.")
        release = re.findall(r"\d+", str(config.get("version", "")))[:2]
        self.dense = not release or tuple(map(int, release)) >= _DENSE_SINCE

    def _columns(self, words: int, groups: int) -> int:
        """Return the columns of rows of packed codes."""
        for group in self.groups:
            bits, width = int(group["weights"].get("num_bits", 4)), group["weights"].get("group_size")
            if width and words == self._words(columns := int(width) * groups, bits):
                return columns
        bits = int(self.groups[0]["weights"].get("num_bits", 4)) if self.groups else 4
        return words * 32 // bits if self.dense else words * (32 // bits)

    def _words(self, columns: int, bits: int) -> int:
        return words_for(columns, bits) if self.dense else -(-columns // (32 // bits))

    def quantized(self, layer: str, tensors: Mapping[str, Tensor]) -> Quantized:
        """Return the matrix in the format of its scheme."""
        scheme = self._scheme(layer)
        kind = str(scheme.get("format") or self.config.get("format"))
        readers: dict[str, Callable[[str, Mapping[str, Tensor], dict[str, Any]], Quantized]] = {
            "pack-quantized": self._packed,
            "int-quantized": _integers,
            "naive-quantized": _integers,
            "float-quantized": _floats,
            "nvfp4-pack-quantized": _nvfp4,
            "mxfp4-pack-quantized": _mxfp4,
        }
        if kind == "naive-quantized" and scheme["weights"].get("type") == "float":
            kind = "float-quantized"
        if kind not in readers:
            raise SourceError(f"The layer {layer!r} is stored as {kind!r}; {', '.join(readers)} are read.")
        return _with_inputs(readers[kind](layer, tensors, scheme["weights"]), scheme.get("input_activations"))

    def notes(self) -> list[str]:
        """Return that inputs or keys and values are not rounded as the checkpoint asks."""
        rounded = [group.get("input_activations") for group in self.groups]
        notes = []
        if any(inputs and _inputs(inputs) is None for inputs in rounded):
            notes.append(
                "The checkpoint asks for rounded inputs of a kind that is not imported; they are in float."
            )
        if self.config.get("kv_cache_scheme"):
            notes.append("The checkpoint asks for rounded keys and values; they are in float.")
        return notes

    def _scheme(self, layer: str) -> dict[str, Any]:
        """Return the group that names a layer. Raises SourceError where none does."""
        for matches in (_by_name, _by_pattern, _by_class):
            for group in self.groups:
                if matches(layer, group.get("targets") or ()):
                    return dict(group)
        raise SourceError(f"No group of the config names the layer {layer!r}; fetch the model again.")

    def _packed(self, layer: str, tensors: Mapping[str, Tensor], weights: dict[str, Any]) -> Quantized:
        packed, scale = needed(tensors, layer, "weight_packed", "weight_scale")
        bits = int(weights.get("num_bits", 4))
        rows, columns = tensors["weight_shape"].tolist() if "weight_shape" in tensors else (len(packed), 0)
        columns = columns or self._columns(packed.shape[1], scale.shape[1])
        checked(layer, "weight_packed", packed, (rows, self._words(columns, bits)))
        codes = self._unpacked(packed, bits, columns)
        zero, group = None, weights.get("group_size")
        if "weight_zero_point" in tensors:
            stored = tensors["weight_zero_point"]
            zero = _zeros(self._unpacked(stored.T.contiguous(), bits, rows).T if stored.dtype == torch.int32 else
                          stored.to(torch.int32) + (1 << (bits - 1)), scale, layer)  # fmt: skip
        return in_order(_order(layer, tensors, codes, scale, group), codes, scale, zero, bits, group)

    def _unpacked(self, words: Tensor, bits: int, count: int) -> Tensor:
        if self.dense or 32 % bits == 0:
            return unpack(words.contiguous(), bits, count)
        shifts = torch.arange(32 // bits) * bits
        codes = (words[..., None].long() & 0xFFFFFFFF) >> shifts & ((1 << bits) - 1)
        return codes.flatten(-2)[..., :count].to(torch.uint8).contiguous()


def _zeros(zero: Tensor, scale: Tensor, layer: str) -> Tensor:
    return checked(layer, "weight_zero_point", zero.to(torch.int32).contiguous(), tuple(scale.shape))


def _integers(layer: str, tensors: Mapping[str, Tensor], weights: dict[str, Any]) -> Quantized:
    weight, scale = needed(tensors, layer, "weight", "weight_scale")
    if weight.dtype != torch.int8:
        raise SourceError(f"The codes of {layer!r} are {weight.dtype}; int8 is read.")
    bits = int(weights.get("num_bits", 8))
    middle = 1 << (bits - 1)
    codes = weight.to(torch.int16) + middle
    if int(codes.min()) < 0 or int(codes.max()) >= 1 << bits:
        raise SourceError(f"The codes of {layer!r} are beyond {bits} bits; fetch the model again.")
    scale = scale.reshape(1, 1).expand(len(weight), 1) if scale.numel() == 1 else scale
    zero = tensors.get("weight_zero_point")
    zeros = None if zero is None else zero.to(torch.int32).reshape(-1, scale.shape[1]).expand(scale.shape) + middle
    group = weights.get("group_size")
    order = _order(layer, tensors, codes, scale, group)
    return in_order(order, codes.to(torch.uint8), scale, zeros, bits, group)


def _order(
    layer: str, tensors: Mapping[str, Tensor], codes: Tensor, scale: Tensor, group: int | None
) -> Tensor | None:
    """Return the columns sorted by group, where the checkpoint has an index of groups; -1 stands for none."""
    index = tensors.get("weight_g_idx")
    if index is None or int(index.min()) < 0:
        return None
    return group_order(layer, "weight_g_idx", index, (codes.shape[1], scale.shape[1]), group)


def _floats(layer: str, tensors: Mapping[str, Tensor], weights: dict[str, Any]) -> Quantized:
    weight, scale = needed(tensors, layer, "weight", "weight_scale")
    block = weights.get("block_structure")
    return fp8(layer, weight, scale, [int(side) for side in block.split("x")] if isinstance(block, str) else block)


def _nvfp4(layer: str, tensors: Mapping[str, Tensor], weights: dict[str, Any]) -> Quantized:
    packed, scale, divisor = needed(tensors, layer, "weight_packed", "weight_scale", "weight_global_scale")
    return nvfp4(layer, packed, scale, divisor=divisor)


def _mxfp4(layer: str, tensors: Mapping[str, Tensor], weights: dict[str, Any]) -> Quantized:
    return mxfp4(layer, *needed(tensors, layer, "weight_packed", "weight_scale"))


def _inputs(described: Mapping[str, Any]) -> Uniform | Float | None:
    """Return the format of inputs in 8 bits with a scale a token; None for any other."""
    plain = described.get("dynamic") is True and described.get("strategy") == "token"
    if not plain or described.get("num_bits") != 8 or not described.get("symmetric", True):
        return None
    return Float(8, "row", "e4m3") if described.get("type") == "float" else Uniform(8, "row", symmetric=True)


def _with_inputs(made: Quantized, described: Mapping[str, Any] | None) -> Quantized:
    """Return a matrix with the format of its inputs, where a kernel multiplies both as they are stored."""
    inputs = _inputs(described) if described else None
    if inputs is None:
        return made
    format = QuantizedInputs(made.format, inputs)
    return Quantized(format, made.codes, made.params, made.shape) if format.multiplies_as_stored else made


def _by_name(layer: str, targets: Iterable[str]) -> bool:
    return layer in targets


def _by_pattern(layer: str, targets: Iterable[str]) -> bool:
    return any(target.startswith("re:") and re.match(target[3:], layer) for target in targets)


def _by_class(layer: str, targets: Iterable[str]) -> bool:
    return "Linear" in targets
