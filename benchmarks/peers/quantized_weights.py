"""The weights of the blocks' linear layers in the files of other programs, dense, and the bits that store them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitmill.sources.gguf import GgufSource

Weights = tuple[dict[str, Tensor], int]
"""Name of a weight -> fp32 (out_features, in_features), and the bits that all of them take."""


def read_dense(folder: Path) -> Weights:
    """Read weights that the program unpacked itself, and what it stores for each."""
    tensors = load_file(folder / "dense.safetensors")
    bits = sum(8 * tensor.nbytes for name, tensor in tensors.items() if ".stored." in name)
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}, bits


def read_gguf(folder: Path) -> Weights:
    """Read a GGUF file."""
    source = GgufSource(folder / "model.gguf")
    names = [name for name in source.names() if is_block_linear(name, source.shape(name))]
    stored = gguf.GGUFReader(folder / "model.gguf").tensors
    bits = sum(8 * int(t.n_bytes) for t in stored if t.name.startswith("blk.") and len(t.shape) > 1)
    return {name: source.tensor(name).float() for name in names}, bits


def read_gptq(folder: Path) -> Weights:
    """Read a folder in the format of AutoGPTQ."""
    (config_file,) = folder.rglob("config.json")
    config = json.loads(config_file.read_text(encoding="utf-8"))["quantization_config"]
    offset = int(config.get("checkpoint_format", "gptq") != "gptq_v2")  # the first version stores zero points - 1
    tensors: dict[str, Tensor] = {}
    for file in config_file.parent.glob("*.safetensors"):
        tensors |= load_file(file)
    dense: dict[str, Tensor] = {}
    bits = 0
    for name in sorted(tensors):
        if name.endswith(".qweight"):
            layer = name.removesuffix(".qweight")
            parts = {part: tensors[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")}
            groups = torch.arange(tensors[f"{layer}.g_idx"].numel()) // config["group_size"]
            if not torch.equal(tensors[f"{layer}.g_idx"].long(), groups):
                parts["g_idx"] = tensors[f"{layer}.g_idx"]  # otherwise it follows from the group size
                groups = parts["g_idx"].long()
            bits += sum(8 * part.nbytes for part in parts.values())
            dense[f"{layer}.weight"] = unpack_gptq(parts, groups, config["bits"], offset)
    return dense, bits


def unpack_gptq(parts: Mapping[str, Tensor], groups: Tensor, bits: int, offset: int) -> Tensor:
    """Return a weight of the format of AutoGPTQ.

    Args:
        parts: `qweight` int32 (in_features * bits / 32, out_features), `qzeros` int32 (groups, out_features * bits
            / 32), `scales` (groups, out_features).
        groups: Group of every input (in_features,).
        bits: Bits of a code.
        offset: What zero points lack.

    Returns:
        fp32 (out_features, in_features).
    """
    codes = _unpack(parts["qweight"].T, bits)
    zeros = (_unpack(parts["qzeros"], bits) + offset) % (1 << bits)
    scales = parts["scales"].float()
    return (codes - zeros.T[:, groups]) * scales.T[:, groups]


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes (rows, n) in a little-endian stream of bits, int32 (rows, n * bits / 32)."""
    stream = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=1, bitorder="little")
    digits = stream.reshape(len(stream), -1, bits).astype(np.int32)
    return torch.from_numpy(digits @ (1 << np.arange(bits, dtype=np.int32)))


def is_block_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Return True for the weight of a linear layer of a block of a Llama or Gemma."""
    return ".layers." in name and len(shape) == 2 and name.endswith("_proj.weight")


READERS: dict[str, Callable[[Path], Weights]] = {
    "auto-round": read_gptq,
    "gptqmodel": read_gptq,
    "hqq": read_dense,
    "llama.cpp": read_gguf,
}
