"""Embedding and head of every architecture, tied and untied: quantized, stored once, loaded, run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import bitmill
from bitmill.architectures.adapter import ADAPTERS
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify
from bitmill.models.embedding_and_head import embedding_and_head
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.method import build_recipe
from bitmill.runtime.modules.embedding import QuantEmbedding
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.runtime.modules.packed import PackedModule
from bitmill.sources.module import ModuleSource
from bitmill.tasks.base import task_for
from helpers.architectures import MODELS, TOKENS, WINDOWS, answer, neox, stored_bytes
from helpers.cases import few_formats
from helpers.selection import one_of_each, thin
from helpers.tiny_models import tiny_model

ENCODERS = [name for name, adapter in ADAPTERS.items() if adapter.task == "text_encoder"]
CASES = [(name, tied) for name in MODELS for tied in (True, False) if name not in ENCODERS or not tied]
FEW = [("llama", True), ("llama", False), ("gpt2", True), ("gemma2", False), ("bert", False)]
every_model = pytest.mark.parametrize(("name", "tied"), thin(CASES, one_of_each(CASES, lambda case: case[0])))
few_models = pytest.mark.parametrize(("name", "tied"), thin(CASES, FEW))


def model_of(name: str, tied: bool) -> nn.Module:
    if name == "gpt_neox":
        model = neox()
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return model
    return tiny_model(name, tie_word_embeddings=tied)


def quantize(model: nn.Module, out=None, head_bits: int | None = 8, **options):
    options = {"method": "rtn", "bits": 4, "group_size": 20, "measure": 0, **options}
    options = {key: value for key, value in options.items() if value is not None}
    return bitmill.quantize(model, out=out, calib=WINDOWS, head_bits=head_bits, **options)


@every_model
@torch.no_grad()
def test_loaded_equals_decoded(name, tied, tmp_path):
    model = model_of(name, tied)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    outcome = quantize(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    packed, checkpoint = bitmill.load(tmp_path / "out"), open_checkpoint(tmp_path / "out")
    assert torch.equal(
        answer(packed),
        answer(task_for(model.config).auto_class.from_pretrained(tmp_path / "out", dtype=torch.float32)),
    )
    decoded = copy.deepcopy(model)
    for key, parameter in decoded.named_parameters():
        layer = key.removesuffix(".weight")
        if layer in checkpoint.formats:
            W = checkpoint.quantized(layer).dequantize()
            parameter.data = W if W.shape == parameter.shape else W.T.contiguous()
            if layer not in checkpoint.outside and "Conv1D" in type(decoded.get_submodule(layer)).__name__:
                parameter.data = W.T.contiguous()
    expected = answer(decoded)
    assert torch.allclose(answer(packed), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    plain = bitmill.load(tmp_path / "out", dense=True)
    assert not [m for m in plain.modules() if isinstance(m, PackedModule)]
    assert torch.allclose(answer(plain), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert {key for key, _ in plain.named_parameters()} == {key for key, _ in model.named_parameters()}

    live = copy.deepcopy(model)
    assert quantize(live).model is live
    assert torch.equal(answer(live), answer(packed))
    assert not any(tensor.is_meta for tensor in (*live.parameters(), *live.buffers()))
    assert outcome.summary["bits_per_weight"] == pytest.approx(checkpoint.bits_per_weight)
    assert bitmill.api.stored_bits(live, False)[0] == pytest.approx(checkpoint.bits_per_weight)
    assert bitmill.api.stored_bits(packed, False)[0] == pytest.approx(checkpoint.bits_per_weight)


@few_models
def test_tied_weights_stored_once(name, tied, tmp_path):
    model = model_of(name, tied)
    ends = embedding_and_head(StreamedModel(ModuleSource(model)))
    assert ends.tied == tied
    assert bool(ends.head) == (name not in ENCODERS)
    outcome = quantize(model, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    stored = {layer for layer in checkpoint.formats if layer in checkpoint.outside}
    assert stored == set(ends.layers)
    assert len(stored) == (1 if tied or not ends.head else 2)
    empty = {weight for weight in ends.weights if weight in checkpoint.files}
    assert empty == {f"{layer}.weight" for layer in stored}
    assert all(checkpoint.tensor(weight).numel() == 0 for weight in empty)
    codes = {key.removesuffix(".codes") for key in checkpoint.files if key.endswith(".codes")}
    assert codes & set(checkpoint.outside) == stored
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["ends"] == ends.to_dict() == outcome.report["ends"]
    assert verify(checkpoint)["layers"] == outcome.summary["layers"] + len(stored)

    packed = bitmill.load(tmp_path / "out")
    assert isinstance(packed.get_submodule(ends.embedding), QuantEmbedding)
    if ends.head:
        assert isinstance(packed.get_submodule(ends.head), QuantLinear)
    in_memory = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers()))
    assert abs(in_memory - stored_bytes(tmp_path / "out")) <= 0.1 * stored_bytes(tmp_path / "out")
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(
        answer(task_for(model.config).auto_class.from_pretrained(tmp_path / "again")), answer(packed)
    )
    plain = bitmill.load(tmp_path / "out", dense=True)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(
        answer(task_for(model.config).auto_class.from_pretrained(tmp_path / "plain")), answer(plain)
    )


@few_models
def test_folder_size_matches_plan(name, tied, tmp_path):
    model = model_of(name, tied)
    ends = embedding_and_head(StreamedModel(ModuleSource(model)))
    rows, columns = model.get_parameter(f"{ends.embedding}.weight").shape
    floats = 4 * rows * columns * len(ends.layers)
    alone = quantize(model, tmp_path / "float", None).summary
    assert (alone["head_bits_per_weight"], alone["head_bytes"]) == (None, 0)
    for bits in (8, 6, 4):
        plan = quantize(model, None, bits, dry_run=True).summary
        summary = quantize(model, tmp_path / str(bits), bits).summary
        packed = rows * (-(-columns * bits // 32) * 4 + 2) + rows * bits // 8  # codes, scales, zeros; 128 rows
        assert summary["head_bytes"] == plan["head_bytes"] == packed * len(ends.layers)
        assert summary["head_bits_per_weight"] == 8 * packed / (rows * columns)
        assert summary["bits_per_weight"] == alone["bits_per_weight"]
        assert summary["unquantized_bytes"] == alone["unquantized_bytes"] - floats
        saved = stored_bytes(tmp_path / "float") - stored_bytes(tmp_path / str(bits))
        assert saved == floats - summary["head_bytes"]
        assert plan["size_bytes"] == stored_bytes(tmp_path / str(bits))


@pytest.mark.parametrize(
    "format", one_of_each([f for f in few_formats() if f.group_size in (40, "tensor")], type), ids=repr
)
@torch.no_grad()
def test_any_row_format_for_head(format, tmp_path):
    model = model_of("llama", True)
    recipe = replace(build_recipe("rtn"), head=format)
    quantize(model, tmp_path / "out", None, method=recipe, bits=None, group_size=None)
    packed, plain = bitmill.load(tmp_path / "out"), bitmill.load(tmp_path / "out", dense=True)
    assert torch.equal(packed.model.embed_tokens(TOKENS), plain.model.embed_tokens(TOKENS))
    assert torch.allclose(answer(packed), answer(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("gemma2", False), ("gpt2", True), ("bert", False)])
@pytest.mark.parametrize("propagate", ["quantized", "float"])
@torch.no_grad()
def test_calibrated_on_stored_table(name, tied, propagate, tmp_path):
    """The codes of the first block differ from those with a float table exactly if its inputs do."""
    model = model_of(name, tied)
    first = {}
    for head_bits in (None, 4):
        out = tmp_path / str(head_bits)
        quantize(model, out, head_bits, method="gptq", bits=3, propagate=propagate)
        checkpoint = open_checkpoint(out)
        layer = next(layer for layer in checkpoint.formats if layer not in checkpoint.outside)
        first[head_bits] = checkpoint.quantized(layer).dequantize()
    assert torch.equal(first[None], first[4]) == (propagate == "float")


@torch.no_grad()
def test_head_bias_kept(tmp_path):
    for tied in (True, False):
        model = model_of("llama", tied)
        model.lm_head.bias = nn.Parameter(torch.randn(128))
        live = copy.deepcopy(model)
        quantize(live)
        model.lm_head.bias.data.zero_()
        bare = copy.deepcopy(model)
        quantize(bare)
        shift = answer(live) - answer(bare)
        assert torch.allclose(shift, live.lm_head.bias.expand(shift.shape), atol=1e-4)


@torch.no_grad()
def test_casts_reach_embeddings(tmp_path):
    for name in ("llama", "gemma"):
        quantize(model_of(name, True), tmp_path / name)
        model = bitmill.load(tmp_path / name, dtype=torch.bfloat16)
        assert model.get_input_embeddings()(TOKENS).dtype == torch.bfloat16
        assert answer(model).dtype == torch.bfloat16
        model.tie_weights()  # a no-op, as nothing is tied
        assert torch.equal(answer(copy.deepcopy(model)), answer(model))
        live = quantize(model_of(name, True)).model
        expected = answer(live)
        assert answer(live.to(torch.bfloat16)).dtype == torch.bfloat16
        assert torch.allclose(
            answer(live.to(torch.float32)), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
        )
