"""The plugin of vLLM: fused layers, tables, and ranks that hold a part of each, against decoded matrices."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import bitmill
from bitmill.errors import CheckpointError
from bitmill.formats import Format
from bitmill.formats.codebook import Codebook
from bitmill.formats.integer_coding import IntegerCoding
from bitmill.formats.quantized import Quantized, fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.integrations.vllm.shards import shard
from bitmill.recipes.compose import with_head
from bitmill.recipes.method import build_recipe
from helpers import stub_vllm
from helpers.workspace import save_model

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="stands in for vLLM")


def quantized(format: Any, shape: tuple[int, int] = (24, 64)) -> Quantized:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return nearest_matrix(format, W, fit_matrix(format, W, None, False))


@pytest.mark.parametrize("format", [Uniform(3, 32), Uniform(4, "row"), Codebook(4, "row"), IntegerCoding(3, 16)])
def test_ranks_hold_the_matrix(format: Format) -> None:
    whole = quantized(format)
    for rank in range(2):
        for cut in [
            (slice(12 * rank, 12 * rank + 12), slice(0, 64)),
            (slice(0, 24), slice(32 * rank, 32 * rank + 32)),
        ]:
            tensors, shape = shard(format, whole.pack(), whole.shape, *cut)
            assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == format.layout(shape)
            codes, params = format.unpack(tensors, shape)
            assert torch.equal(format.dequantize(codes, params, shape), whole.dequantize()[cut])


def test_ranks_that_cut_groups_are_refused() -> None:
    whole = quantized(Uniform(4, 64), (8, 192))
    with pytest.raises(CheckpointError, match="columns 0 to 96"):
        shard(whole.format, whole.pack(), whole.shape, slice(0, 8), slice(0, 96))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm")
    model = save_model(path / "float")
    LlamaForCausalLM.from_pretrained(model, tie_word_embeddings=True).save_pretrained(model)
    recipe = with_head(build_recipe("rtn", {"bits": 4, "group_size": 8}), 8)
    bitmill.quantize(str(model), recipe, out=path / "packed", measure=0)
    return path / "packed"


@pytest.fixture
def config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    stub_vllm.install(monkeypatch)
    from bitmill.integrations.vllm.config import BitmillConfig

    made = BitmillConfig.from_config(described(folder))
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return made


def described(folder: Path) -> dict[str, Any]:
    return bitmill.load(folder).config.quantization_config.to_dict()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def fill(layer: nn.Module, tensors: dict[str, Tensor], stored: dict[str, Any]) -> nn.Module:
    """Load the tensors of some stored matrices, as vLLM does."""
    for name, part in stored.items():
        for key, tensor in tensors.items():
            above, _, leaf = key.rpartition(".")
            if above == name:
                parameter: Any = layer.get_parameter(leaf)
                parameter.weight_loader(parameter, tensor, *([] if part is None else [part]))
    layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
    return layer


def test_fused_layers_and_ranks(config: Any, folder: Path) -> None:
    model, tensors = bitmill.load(folder, dense=True), tensors_of(folder)
    at = "model.layers.0.self_attn"
    W = [model.get_submodule(f"{at}.{name}").weight.float() for name in ("q_proj", "k_proj", "v_proj")]
    x = torch.randn(5, W[0].shape[1], generator=torch.Generator().manual_seed(2))
    stored = {f"{at}.q_proj": "q", f"{at}.k_proj": "k", f"{at}.v_proj": "v"}
    sizes = [len(matrix) for matrix in W]
    whole = fill(stub_vllm.LinearBase(config, f"{at}.qkv_proj", sizes, x.shape[1]), tensors, stored)
    expected = x @ torch.cat(W).T
    assert torch.allclose(whole(x), expected, atol=2e-2 * float(expected.abs().max()))
    halves = [size // 2 for size in sizes]
    ranks = [
        fill(stub_vllm.LinearBase(config, f"{at}.qkv_proj", halves, x.shape[1], rank, 2), tensors, stored)(x)
        for rank in range(2)
    ]
    parts = zip(*[y.split(halves, -1) for y in ranks])
    joined = torch.cat([half for part in parts for half in part], -1)
    assert torch.allclose(joined, whole(x), atol=1e-5 * float(expected.abs().max()))


def test_rows_of_inputs(config: Any, folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    W = bitmill.load(folder, dense=True).get_submodule(name).weight.float()
    x, tensors = torch.randn(3, W.shape[1]), tensors_of(folder)
    half = W.shape[1] // 2
    ranks = [
        fill(stub_vllm.LinearBase(config, name, [len(W)], half, rank, 2), tensors, {name: None})(
            x[:, rank * half : (rank + 1) * half]
        )
        for rank in range(2)
    ]
    expected = x @ W.T
    assert torch.allclose(sum(ranks), expected, atol=2e-2 * float(expected.abs().max()))


def test_embeddings_and_tied_head(config: Any, folder: Path) -> None:
    model, tensors = bitmill.load(folder, dense=True), tensors_of(folder)
    W = model.get_input_embeddings().weight.float()
    words, width = W.shape
    ids = torch.tensor([0, 3, words - 1])
    name = "model.embed_tokens"
    for ranks in (1, 2):
        logits, x = [], torch.randn(2, width)
        for rank in range(ranks):
            table = stub_vllm.VocabParallelEmbedding(config, name, words, width, rank, ranks)
            head = stub_vllm.ParallelLMHead(config, "lm_head", words, width, rank, ranks)
            head.quant_method.tie_weights(head, table)
            fill(table, tensors, {name: None})
            head.quant_method.process_weights_after_loading(head)
            assert not list(head.named_parameters())
            first = table.shard_indices.org_vocab_start_index
            own = (ids >= first) & (ids < table.shard_indices.org_vocab_end_index)
            rows = table.quant_method.embedding(table, ids[own] - first)
            assert torch.allclose(rows, W[ids[own]], atol=1e-3)
            logits.append(head.quant_method.apply(head, x)[:, : table.shard_indices.org_vocab_end_index - first])
        expected = x @ W.T
        assert torch.allclose(torch.cat(logits, -1), expected, atol=2e-2 * float(expected.abs().max()))


def test_refusals(config: Any, folder: Path) -> None:
    found = described(folder)
    kind = type(config)
    with pytest.raises(CheckpointError, match="attention"):
        kind.from_config({**found, "recipe": {**found["recipe"], "attention": {"queries": 8}}})
    layer = stub_vllm.RoutedExperts()
    config.formats["model.layers.0.mlp.experts.0"] = Uniform(4, 32)
    with pytest.raises(CheckpointError, match="experts"):
        config.get_quant_method(layer, "model.layers.0.mlp.experts")
    half_read = stub_vllm.LinearBase(config, "model.layers.0.mlp.down_proj", [4], 4)
    with pytest.raises(CheckpointError, match="has no matrix"):
        half_read.quant_method.process_weights_after_loading(half_read)


def test_renamed_layers(config: Any) -> None:
    config.apply_vllm_mapper(stub_vllm.WeightsMapper({"model.": "language_model.model."}, {".q_proj": ("", "q")}))
    assert "language_model.model.layers.0.self_attn.q_proj" in config.formats
    assert config.part_formats("language_model.model.layers.0.self_attn.qkv_proj")[2] is not None
    assert config.get_name() == "bitmill"
    assert not config.get_config_filenames()


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_vllm.install(monkeypatch)
    registered = {}
    quantization: Any = sys.modules["vllm.model_executor.layers.quantization"]
    quantization.register_quantization_config = lambda name: lambda cls: registered.setdefault(name, cls)
    from bitmill.integrations.vllm import register

    register()
    assert registered["bitmill"].__name__ == "BitmillConfig"
