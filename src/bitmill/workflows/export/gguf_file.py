"""A GGUF file, whose blocks decode to the numbers of the folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from bitmill.errors import UsageError
from bitmill.exports.base import Layer
from bitmill.exports.gguf_blocks import blocks, unsupported_reason
from bitmill.exports.gguf_metadata import write_hyperparameters, write_vocabulary
from bitmill.sources.gguf_architectures import LAYOUTS, Layout, gguf_name, llama3_factors
from bitmill.sources.zoo import ZOO
from bitmill.workflows.export.job import ExportJob, Writer, check_equal
from bitmill.workflows.load import load_tokenizer

Kind = gguf.GGMLQuantizationType

_ALIKE = {"mistral": "llama"}  # a model type -> the one whose tensors it has
_DESCRIBED = ("llama", "qwen2", "qwen3")  # whose metadata is written from a config and a tokenizer
_EXPORTED = (*_DESCRIBED, "gemma", "gemma2", "gemma3")
_FILE_TYPES = {
    gguf.GGMLQuantizationType[name]: gguf.LlamaFileType[f"MOSTLY_{file}"]
    for name, file in {
        **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K", "IQ4_NL", "IQ4_XS")},
        **{name: f"{name}_M" for name in ("Q3_K", "Q4_K", "Q5_K")},
        "MXFP4": "MXFP4_MOE",
    }.items()
}
_WRITTEN_ANEW = ("general.architecture", "general.file_type", "general.quantization_version")


class GgufWriter(Writer):
    """Writes formats of block types as they are, and other levels in the smallest type that holds them exactly."""

    name, readers, ending = "gguf", "llama.cpp and programs built on it", ".gguf"
    is_file: ClassVar[bool] = True

    def check(self, job: ExportJob) -> dict[str, Layer]:
        """Return the layers of the blocks. Raises UsageError for an architecture that is not exported."""
        architecture = _architecture(str(job.checkpoint.config.get("model_type")))
        if _copied(job) is None and architecture not in _DESCRIBED:
            raise UsageError(
                f"Models of type {job.config.model_type!r} are exported to gguf where they come from a demo model "
                "that is a GGUF file, whose metadata is copied; use --to dense."
            )
        return job.layers(self.name, unsupported_reason)

    def write(self, job: ExportJob, layers: dict[str, Layer], out: Path) -> list[str]:
        """Write the file. Raises UsageError for a tokenizer that cannot be exported."""
        architecture = _architecture(job.config.model_type)
        writer = gguf.GGUFWriter(out, architecture, use_temp_file=True)  # tensors leave memory as they are made
        if source := _copied(job):
            _copy_metadata(writer, source)
        else:
            folder = job.checkpoint.folder
            writer.add_name(folder.resolve().name)
            write_hyperparameters(writer, job.config)
            tokenizer = load_tokenizer(folder, trust_remote_code=job.trust_remote_code)
            write_vocabulary(writer, tokenizer, job.config.vocab_size)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        kinds = Counter[Kind]()
        for name, data, kind in _tensors(job, layers, LAYOUTS[architecture]):
            writer.add_tensor(name, data, raw_dtype=kind)
            kinds[kind] += data.size
        layered = [kind for kind, _ in kinds.most_common() if kind in _FILE_TYPES]
        writer.add_file_type(_FILE_TYPES[layered[0]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        notes = [f"Layers are stored as {', '.join(kind.name for kind in layered)}."]
        if Kind.F16 in kinds:
            notes.append(
                "Embedding or head are in 16 bits; quantize with "
                '--rule "*embed_tokens=uniform:bits=8,group_size=32,symmetric=true" for 8.'
            )
        return notes


def _copied(job: ExportJob) -> Path | None:
    """Return the GGUF file that the folder was quantized from, where it is a demo model; None otherwise."""
    source = ZOO.get(str(job.checkpoint.report.get("source")))
    if source is None or source.cached.suffix != ".gguf" or not source.cached.is_file():
        return None
    return source.cached


def _architecture(model_type: str) -> str:
    """Return the name of a model type in llama.cpp. Raises UsageError for one that is not exported."""
    kind = _ALIKE.get(model_type, model_type)
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
        if field.name.startswith("GGUF.") or field.name in _WRITTEN_ANEW:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def _tensors(job: ExportJob, layers: dict[str, Layer], layout: Layout) -> Iterator[tuple[str, np.ndarray, Kind]]:
    """Yield name, data and type of every tensor."""
    config, rope = job.config, getattr(job.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        factors = llama3_factors(
            rope["rope_theta"],
            config.head_dim,
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
        yield "rope_freqs.weight", factors.float().numpy(), Kind.F32
    job.progress.start("export", len(layers))
    for name, quantized in job.quantized():
        stored = gguf_name(layout, f"{name}.weight")
        held = name in layers or unsupported_reason(Layer(quantized.format, quantized.shape)) is None
        if not held:  # embedding and head
            yield stored, *_float(quantized.dequantize())
            continue
        data, kind = blocks(quantized)
        check_equal(name, torch.from_numpy(dequantize(data, kind)), quantized, kind.name)
        order = _row_order(layout, config, stored, data.shape[0])
        yield stored, data if order is None else np.ascontiguousarray(data[order.numpy()]), kind
        job.progress.advance()
    job.progress.finish()
    for name, tensor in job.floats():
        stored = gguf_name(layout, name)
        order = _row_order(layout, config, stored, tensor.shape[0])
        values = tensor.float() if order is None else tensor.float()[order]
        yield stored, *_float(values + 1 if layout.norm_plus_one and name.endswith("norm.weight") else values)


def _row_order(layout: Layout, config: Any, stored: str, rows: int) -> Tensor | None:
    """Return the order in which llama.cpp has the rows of a tensor; None where it is that of transformers."""
    module = stored.split(".")[-2]
    if module not in layout.interleaved:
        return None
    heads = getattr(config, layout.interleaved[module])
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _float(tensor: Tensor) -> tuple[np.ndarray, Kind]:
    """Return a matrix in 16 bits, and a vector in 32, which engines require."""
    if tensor.dim() < 2:
        return tensor.float().numpy(), Kind.F32
    half = tensor.to(torch.float16)
    if bool(torch.isfinite(half).all()):
        return half.numpy(), Kind.F16
    words = tensor.to(torch.bfloat16).contiguous().view(torch.uint8)
    return words.numpy(), Kind.BF16
