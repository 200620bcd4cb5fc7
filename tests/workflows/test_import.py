"""Checkpoints of other programs become folders that decode to their weights, load, and run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify
from bitmill.errors import OutputError, SourceError
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import tiny_model

TOKENS = torch.arange(24).view(2, 12) + 3
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def packed(place, model_type="llama", **options):
    options = {"bits": 4, "group_size": 32, **options}
    bitmill.quantize(tiny_model(model_type, **SIZES), "rtn", out=place / "packed", measure=0, **options)
    return place / "packed"


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_round_trip(tmp_path, to):
    folder = packed(tmp_path, symmetric=to != "awq")
    bitmill.export(folder, to, tmp_path / "out", dtype="float32")
    result = bitmill.import_checkpoint(tmp_path / "out", tmp_path / "again")
    assert result.program == to
    assert f"from              {to}" in str(result)
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "again", digests="all")
    assert after.report["imported"] == to
    assert after.formats.keys() == before.formats.keys() - set(before.outside)
    for name, format in after.formats.items():
        one, two = before.quantized(name), after.quantized(name)
        assert format == before.formats[name]
        assert torch.equal(one.codes, two.codes)
        assert all(torch.equal(one.params[key], two.params[key]) for key in one.params)
    dense = bitmill.load(tmp_path / "again", dense=True)
    assert torch.equal(logits(dense), logits(bitmill.load(folder, dense=True)))
    assert torch.allclose(logits(bitmill.load(tmp_path / "again")), logits(dense), atol=0.05)
    assert "imported from a checkpoint of" in (tmp_path / "again" / "README.md").read_text()
    assert verify(after)


def test_experts(tmp_path):
    """The two matrices of an expert that transformers joins are imported as one."""
    tiny_model("mixtral", num_local_experts=2, **SIZES).save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    made = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            codes = (tensor * 512).round().clamp(-128, 127).to(torch.int8)
            made |= {name: codes, f"{name}_scale": torch.full((len(codes), 1), 1 / 512)}
        else:
            made[name] = tensor
    save_file(made, tmp_path / "dense" / "model.safetensors")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group},
    }  # fmt: skip
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    result = bitmill.import_checkpoint(tmp_path / "dense", tmp_path / "again")
    assert result.layers == 2 * 2 * 2
    after = open_checkpoint(tmp_path / "again")
    model = bitmill.load(tmp_path / "again", dense=True)
    loaded = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("gate_up_proj")}
    assert loaded
    for name, fused in loaded.items():
        prefix = name.removesuffix(".gate_up_proj").replace(".mlp.", ".block_sparse_moe.")
        both = [made[f"{prefix}.1.{w}.weight"] / 512 for w in ("w1", "w3")]
        assert torch.equal(fused[1], torch.cat(both))
        assert torch.equal(after.quantized(f"{name}.expert1").dequantize(), torch.cat(both))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_gguf(tmp_path, kind):
    model = tiny_model("llama", **SIZES)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    kinds = {f"blk.{i}.{name}.weight": kind for i in range(2) for name in names}
    path = write_gguf(tmp_path / "model.gguf", model, kinds={**kinds, "token_embd.weight": "Q8_0"})
    result = bitmill.import_checkpoint(path, tmp_path / "out")
    assert result.layers == 15
    after = open_checkpoint(tmp_path / "out", digests="all")
    assert after.outside
    expected = bitmill.load(path, dtype=torch.float32)
    for name in after.formats:
        decoded, stored = after.quantized(name).dequantize(), expected.get_submodule(name).weight
        assert torch.allclose(decoded, stored, atol=2e-4)  # that reader rounds to 16 bits
    assert torch.allclose(logits(bitmill.load(tmp_path / "out")), logits(expected), atol=0.05)


def test_refused(tmp_path):
    model = tiny_model("llama", **SIZES)
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(SourceError, match="is not quantized; quantize it with bitmill quantize"):
        bitmill.import_checkpoint(tmp_path / "float", tmp_path / "out")
    with pytest.raises(SourceError, match=r"no folder and no \.gguf file at"):
        bitmill.import_checkpoint(tmp_path / "absent", tmp_path / "out")
    path = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(SourceError, match="holds floats alone"):
        bitmill.import_checkpoint(path, tmp_path / "out")
    folder = packed(tmp_path)
    with pytest.raises(SourceError, match="quantized by 'bitmill', which is not imported"):
        bitmill.import_checkpoint(folder, tmp_path / "out")
    bitmill.export(folder, "gptq", tmp_path / "gptq")
    with pytest.raises(OutputError, match="exists"):
        bitmill.import_checkpoint(tmp_path / "gptq", folder)
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("qzeros"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, tmp_path / "gptq" / "model.safetensors")
    with pytest.raises(SourceError, match=r"qzeros' has the shape"):
        bitmill.import_checkpoint(tmp_path / "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "change", [{"config_groups": 3}, {"config_groups": {"a": {"targets": [7], "weights": {}}}}, {"version": []}]
)
def test_damaged_config(tmp_path, change):
    bitmill.export(packed(tmp_path), "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    if "version" in change:  # which says nothing then
        assert bitmill.import_checkpoint(tmp_path / "out", tmp_path / "again").layers == 14
        return
    with pytest.raises(SourceError, match="fetch the model again"):
        bitmill.import_checkpoint(tmp_path / "out", tmp_path / "again")
