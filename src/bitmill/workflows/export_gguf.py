"""Write a quantized folder as a GGUF file, whose blocks decode to its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from bitmill.architectures.experts import expert_of
from bitmill.checkpoint.marker import WEIGHT
from bitmill.checkpoint.reader import Checkpoint
from bitmill.errors import NumericsError, UsageError
from bitmill.exports.base import Layer
from bitmill.exports.gguf_blocks import blocks, unsupported_reason
from bitmill.exports.gguf_metadata import write_hyperparameters, write_vocabulary
from bitmill.models.config_only import open_config_only
from bitmill.progress import Progress
from bitmill.sources.gguf_architectures import LAYOUTS, Layout, gguf_name, llama3_factors
from bitmill.sources.zoo import ZOO
from bitmill.workflows.load import load_tokenizer

_SAME = {"mistral": "llama"}  # model type -> architecture of equal tensors
_DESCRIBED = ("llama", "qwen2", "qwen3")  # whose metadata is written from a config and a tokenizer
_EXPORTED = (*_DESCRIBED, "gemma", "gemma2", "gemma3")
_FILE_TYPES = {
    gguf.GGMLQuantizationType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    gguf.GGMLQuantizationType.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    gguf.GGMLQuantizationType.MXFP4: gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
}
_COPIED_APART = ("general.architecture", "general.file_type", "general.quantization_version")


def gguf_layers(checkpoint: Checkpoint) -> dict[str, Layer]:
    """Return the quantized layers of the blocks.

    Raises:
        UsageError: the architecture cannot be exported, or no block type holds a layer.
    """
    _architecture(str(checkpoint.config.get("model_type")))
    layers = {
        name: Layer(format, checkpoint.shape(name))
        for name, format in checkpoint.formats.items()
        if name not in checkpoint.outside
    }
    for name, layer in layers.items():
        reason = "experts are not exported to gguf yet" if expert_of(name) else unsupported_reason(layer)
        if reason:
            raise UsageError(f"gguf cannot hold the layer {name!r}: {reason}, or use --to dense.")
    return layers


def write_gguf(
    checkpoint: Checkpoint, layers: dict[str, Layer], out: Path, trust_remote_code: bool, progress: Progress
) -> list[str]:
    """Write a file.

    Args:
        checkpoint: the folder.
        layers: as of `gguf_layers`.
        out: the file.
        trust_remote_code: allow Python code in the folder to run.
        progress: where progress is reported.

    Returns:
        Notes, a sentence each.

    Raises:
        UsageError: the architecture or the tokenizer cannot be exported.
    """
    config = open_config_only(checkpoint.folder, trust_remote_code=trust_remote_code).config
    architecture = _architecture(config.model_type)
    layout = LAYOUTS[architecture]
    source = ZOO.get(str(checkpoint.report.get("source")))
    copies = source is not None and source.cached.suffix == ".gguf" and source.cached.is_file()
    if not copies and architecture not in _DESCRIBED:
        raise UsageError(
            f"Models of type {config.model_type!r} are exported to gguf where they come from a demo model "
            "that is a GGUF file, whose metadata is copied; use --to dense."
        )
    writer = gguf.GGUFWriter(out, architecture)
    if copies and source is not None:
        _copy_metadata(writer, source.cached)
    else:
        writer.add_name(checkpoint.folder.resolve().name)
        write_hyperparameters(writer, config)
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
        write_vocabulary(writer, tokenizer, config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = Counter[gguf.GGMLQuantizationType]()
    progress.start("export", len(layers))
    for name, data, kind in _tensors(checkpoint, layers, config, layout, progress):
        writer.add_tensor(name, data, raw_dtype=kind)
        kinds[kind] += data.size
    layered = [kind for kind, _ in kinds.most_common() if kind in _FILE_TYPES]
    writer.add_file_type(_FILE_TYPES[layered[0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    progress.finish()
    notes = [f"Layers are stored as {', '.join(kind.name for kind in layered)}."]
    if gguf.GGMLQuantizationType.F16 in kinds:
        notes.append(
            "Embedding or head are in 16 bits; quantize with "
            '--rule "*embed_tokens=uniform:bits=8,group_size=32,symmetric=true" for 8.'
        )
    return notes


def _architecture(model_type: str) -> str:
    """Return the name of a model type in llama.cpp. Raises UsageError for one that is not exported."""
    kind = _SAME.get(model_type, model_type)
    for architecture in _EXPORTED:
        if LAYOUTS[architecture].model_type == kind:
            return architecture
    raise UsageError(
        f"Models of type {model_type!r} are not exported to gguf; {', '.join(_EXPORTED)} and mistral are. Use "
        "--to dense."
    )


def _copy_metadata(writer: gguf.GGUFWriter, path: Path) -> None:
    """Copy the metadata of the file that the folder was quantized from."""
    for field in gguf.GGUFReader(path).fields.values():
        if field.name.startswith("GGUF.") or field.name in _COPIED_APART:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def _tensors(
    checkpoint: Checkpoint, layers: dict[str, Layer], config: Any, layout: Layout, progress: Progress
) -> Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
    """Yield name, data and type of every tensor.

    Raises:
        NumericsError: the blocks of a layer would decode to other numbers.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        factors = llama3_factors(rope["rope_theta"], config.head_dim, rope["factor"])
        yield "rope_freqs.weight", factors.float().numpy(), gguf.GGMLQuantizationType.F32
    packed = {f"{name}.{WEIGHT}" for name in checkpoint.formats}
    for name, format in checkpoint.formats.items():
        packed |= {f"{name}.{part}" for part in format.layout(checkpoint.shape(name))}
        quantized = checkpoint.quantized(name)
        stored = gguf_name(layout, f"{name}.weight")
        held = name in layers or unsupported_reason(Layer(format, checkpoint.shape(name))) is None
        if not held:  # embedding and head
            yield stored, *_float(quantized.dequantize())
            continue
        data, kind = blocks(quantized)
        if not np.array_equal(dequantize(data, kind), quantized.dequantize().numpy()):
            raise NumericsError(f"The layer {name!r} would decode to other numbers as {kind.name}; report this.")
        order = _row_order(layout, config, stored, data.shape[0])
        yield stored, data if order is None else np.ascontiguousarray(data[order.numpy()]), kind
        progress.advance()
    for name in checkpoint.entries:
        if name in packed:
            continue
        stored, tensor = gguf_name(layout, name), checkpoint.tensor(name).float()
        order = _row_order(layout, config, stored, tensor.shape[0])
        tensor = tensor if order is None else tensor[order]
        yield stored, *_float(tensor + 1 if layout.norm_plus_one and name.endswith("norm.weight") else tensor)


def _row_order(layout: Layout, config: Any, stored: str, rows: int) -> Tensor | None:
    """Return the order in which llama.cpp has the rows of a tensor; None where it is that of transformers."""
    module = stored.split(".")[-2]
    if module not in layout.interleaved:
        return None
    heads = getattr(config, layout.interleaved[module])
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _float(tensor: Tensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Return a matrix in 16 bits, and a vector in 32, which engines require."""
    if tensor.dim() < 2:
        return tensor.float().numpy(), gguf.GGMLQuantizationType.F32
    half = tensor.to(torch.float16)
    if bool(torch.isfinite(half).all()):
        return half.numpy(), gguf.GGMLQuantizationType.F16
    words = tensor.to(torch.bfloat16).contiguous().view(torch.uint8)
    return words.numpy(), gguf.GGMLQuantizationType.BF16
