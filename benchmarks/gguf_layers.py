"""Errors of layers on GGUF's grids: bitmill's GPTQ against llama.cpp's quantizer with an importance matrix.

    python benchmarks/gguf_layers.py --library .../llama_cpp/lib/libggml-base.so --types Q4_K,Q3_K,Q2_K

Gram matrices of layers of the demo model are taken from windows of the articles; both programs quantize one float
matrix to a type, llama.cpp with the diagonal of its Gram matrix, bitmill with all of it. The error is that of the
layer's output on windows of other articles, relative to the output; the table has llama.cpp's and the ratio.

The demo model is a GGUF file: a layer that is stored in a type is on the grid of this type already, and llama.cpp
finds it again. Compare such a layer in other types.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn

import bitmill
from bitmill.formats.gguf_types import GGUF_TYPES
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.numerics.statistics import Statistics
from bitmill.solvers.base import output_error
from bitmill.solvers.gptq import GPTQ

TOKENS, BATCH = 512, 4
LAYERS = "model.layers.1.mlp.down_proj,model.layers.1.self_attn.o_proj,model.layers.5.mlp.down_proj"
SOLVERS = {
    "gptq": GPTQ(),
    "gptq, inverse": GPTQ(importance="inverse"),
    "gptq, 2 column passes, 1 group pass": GPTQ(column_passes=2, group_passes=1),
}


class _Enough(Exception):
    """Ends a forward pass after the last layer that is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="libggml-base.so of llama-cpp-python")
    parser.add_argument("--types", default="Q4_K,Q3_K,Q2_K")
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--layers", default=LAYERS, help="in the order in which the model runs them")
    parser.add_argument("--texts", type=Path, required=True, help="articles, .jsonl with the key text")
    parser.add_argument("--windows", type=int, default=48)
    asked = parser.parse_args()
    library, names = _library(asked.library), asked.layers.split(",")
    model = bitmill.load(asked.model)
    layers = {name: model.get_submodule(name) for name in names}
    calibrate, held_out = windows(asked.model, asked.texts, asked.windows)
    grams, others = (gram_matrices(model, layers, ids) for ids in (calibrate, held_out))
    for name, layer in layers.items():
        W = layer.weight.detach().float()
        for kind in asked.types.split(","):
            theirs = output_error(W, llama_cpp(library, kind, W, grams[name].diagonal()), others[name])
            ours = {
                how: output_error(W, found, others[name]) / theirs
                for how, found in by_bitmill(kind, W, grams[name])
            }
            ratios = ", ".join(f"{how} {ratio:.3f}" for how, ratio in ours.items())
            print(f"{name} {kind}: llama.cpp {theirs:.5f}; of that {ratios}", flush=True)


def windows(model: str, texts: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return windows of the first and of the last articles in random order, a quarter as many of these."""
    tokenizer = bitmill.load_tokenizer(model)
    articles = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(articles)
    found = []
    for ordered, wanted in ((articles, count), (articles[::-1], -(-count // 4))):
        ids = (tokenizer(text[: 12 * TOKENS])["input_ids"] for text in ordered)
        long = (each[:TOKENS] for each in ids if len(each) >= TOKENS)
        found.append(torch.tensor([each for _, each in zip(range(wanted), long)]))
    return found[0], found[1]


def gram_matrices(model: nn.Module, layers: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    """Return the mean of x x^T over the inputs of each layer."""
    sums: dict[str, Tensor] = {}
    last = list(layers)[-1]
    hooks = []
    for name, layer in layers.items():

        def add(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x
            if name == last:
                raise _Enough

        hooks.append(layer.register_forward_pre_hook(add))
    with torch.inference_mode():
        for batch in ids.split(BATCH):
            try:
                model(batch, use_cache=False)
            except _Enough:
                continue
    for hook in hooks:
        hook.remove()
    return {name: total.clone() / ids.numel() for name, total in sums.items()}


def by_bitmill(kind: str, W: Tensor, gram: Tensor) -> list[tuple[str, Tensor]]:
    """Return the decoded matrix of rounding to the nearest on a searched grid, and of each solver."""
    format = GGUF_TYPES[kind]
    fitted = nearest_matrix(format, W, fit_matrix(format, W, gram.diagonal(), search=True)).dequantize()
    stats = Statistics(gram, TOKENS)
    return [
        ("nearest", fitted),
        *((how, each.solve(W, stats, format).dequantize()) for how, each in SOLVERS.items()),
    ]


def llama_cpp(library: ctypes.CDLL, kind: str, W: Tensor, importance: Tensor) -> Tensor:
    """Return the matrix that llama.cpp makes of W with an importance of every column, decoded."""
    number = GGMLQuantizationType[kind]
    columns, size = GGML_QUANT_SIZES[number]
    rows, weights = W.contiguous().numpy(), importance.contiguous().numpy()
    out = np.zeros((rows.shape[0], rows.shape[1] // columns * size), np.uint8)
    library.ggml_quantize_init(int(number))
    library.ggml_quantize_chunk(
        int(number), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights.ctypes.data
    )
    return torch.from_numpy(dequantize(out, number))


def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    pointer = ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


if __name__ == "__main__":
    main()
