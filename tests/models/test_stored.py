"""The tensors of a folder reach the model as from_pretrained loads them, or the folder is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel
from bitmill.sources.module import ModuleSource
from bitmill.sources.open import open_source
from helpers.architectures import TOKENS, neox
from helpers.tiny_models import tiny_model

FILE = "model.safetensors"
PROJECTION = "model.layers.0.self_attn.q_proj"


def save(model, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / FILE)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"})


def theirs(folder: Path, **options) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def apart(a, b) -> float:
    a, b = a(TOKENS).logits, b(TOKENS).logits
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("head_bits", [None, 8])
def test_distinct_head_of_tied_config(tmp_path, head_bits):
    """The stored head counts, as in transformers; a copy of the embedding is tied to it."""
    tensors = save(tiny_model("llama", tie_word_embeddings=True), tmp_path / "m")
    table = tensors["model.embed_tokens.weight"]
    rewrite(tmp_path / "m", tensors | {"lm_head.weight": table.clone()})
    streamed = StreamedModel(open_source(tmp_path / "m"))
    assert not streamed.untied
    assert "lm_head.weight" not in streamed.names()
    rewrite(tmp_path / "m", tensors | {"lm_head.weight": torch.randn(table.shape) * table.std()})
    right = theirs(tmp_path / "m")
    assert not torch.equal(right.lm_head.weight, right.model.embed_tokens.weight)
    assert apart(bitmill.load(tmp_path / "m"), right) < 1e-5
    assert StreamedModel(ModuleSource(right)).untied
    out = tmp_path / "q"
    bitmill.quantize(tmp_path / "m", "rtn", bits=8, head_bits=head_bits, out=out, measure=0)
    assert apart(bitmill.load(out), right) < 0.1
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distinct", [False, True])
def test_tied_tensors_compared(tmp_path, monkeypatch, dtype, distinct):
    monkeypatch.setattr("bitmill.models.stored.COMPARED_ROWS", 50)
    tensors = save(tiny_model("llama", tie_word_embeddings=True).bfloat16(), tmp_path)
    head = tensors["model.embed_tokens.weight"].to(dtype, copy=True)
    head[-1, -1] += distinct
    rewrite(tmp_path, tensors | {"lm_head.weight": head})
    assert StreamedModel(open_source(tmp_path)).untied == distinct


@pytest.mark.parametrize("head_bits", [None, 8])
def test_renamed_head(tmp_path, head_bits):
    """GPT-NeoX stores embed_out; releases of transformers differ in what the model calls it."""
    tensors = save(neox(), tmp_path / "m")
    stored = {re.sub("^lm_head", "embed_out", name): tensor for name, tensor in tensors.items()}
    assert "embed_out.weight" in stored
    rewrite(tmp_path / "m", stored)
    bitmill.quantize(tmp_path / "m", "rtn", bits=8, head_bits=head_bits, out=tmp_path / "q", measure=0)
    assert apart(bitmill.load(tmp_path / "q"), theirs(tmp_path / "m")) < 0.1


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        *(f"{PROJECTION}.{leaf}" for leaf in ("weight_scale", "weight_scale_inv", "input_scale", "bias", "SCB")),
        f"{PROJECTION}.weight_quantizer._scale",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.extra.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.bias",
    ],
)
def test_unused_tensor_refused(tmp_path, name, prefixed):
    tensors = save(tiny_model("llama"), tmp_path) | {name: torch.ones(1)}
    if not prefixed:
        tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    rewrite(tmp_path, tensors)
    with pytest.raises(SourceError, match="does not use"):
        StreamedModel(open_source(tmp_path))


def test_blockwise_scales_refused(tmp_path):
    tensors = save(tiny_model("llama"), tmp_path)
    tensors[f"{PROJECTION}.weight"] = tensors[f"{PROJECTION}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{PROJECTION}.weight_scale_inv"] = torch.ones(1, 1)
    rewrite(tmp_path, tensors)
    with pytest.raises(SourceError, match=r"weight_scale_inv.*quantized already"):
        StreamedModel(open_source(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integer_weight_refused(tmp_path, dtype):
    tensors = save(tiny_model("llama"), tmp_path)
    rewrite(tmp_path, tensors | {f"{PROJECTION}.weight": tensors[f"{PROJECTION}.weight"].to(dtype)})
    with pytest.raises(SourceError, match=r"as u?int\d+: it is quantized already"):
        StreamedModel(open_source(tmp_path))


def test_ignorable_tensors(tmp_path):
    """Buffers that models stored once are ignored; other modules, such as a reward head, are listed."""
    tensors = save(tiny_model("llama"), tmp_path)
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4), "v_head.weight": torch.ones(1, 32)}
    extra["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.ones(1, 1, 8, 8)
    extra["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    rewrite(tmp_path, tensors | extra)
    streamed = StreamedModel(open_source(tmp_path))
    assert streamed.unused == ["v_head.weight"]
    assert set(streamed.names()) == set(tensors)


def test_one_tensor_under_two_names(tmp_path):
    tensors = save(tiny_model("llama"), tmp_path)
    rewrite(tmp_path, tensors | {"norm.weight": torch.ones(32)})
    with pytest.raises(SourceError, match="twice"):
        StreamedModel(open_source(tmp_path))


def test_code_of_the_folder_runs(tmp_path):
    """A class of the folder comes before one of transformers with its name."""
    save(tiny_model("llama"), tmp_path)
    (tmp_path / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM as Base\n\n\nclass LlamaForCausalLM(Base):\n"
        "    def forward(self, *args, **kwargs):\n        output = super().forward(*args, **kwargs)\n"
        "        output.logits = output.logits * 0.25\n        return output\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    for trusted in (True, False):
        loaded = bitmill.load(tmp_path, trust_remote_code=trusted)
        assert apart(loaded, theirs(tmp_path, trust_remote_code=trusted)) < 1e-5
        assert type(loaded).__module__.startswith("transformers.") is not trusted


@pytest.mark.parametrize("head_bits", [None, 8])
@torch.no_grad()
def test_folder_of_another_release(tmp_path, head_bits):
    """Layers are found under the names that an earlier release of transformers gave them."""
    out = tmp_path / "q"
    bitmill.quantize(neox(), "rtn", bits=8, head_bits=head_bits, out=out, measure=0)
    expected = bitmill.load(out)(TOKENS).logits
    for shard in out.glob("*.safetensors"):
        tensors = {re.sub("^lm_head", "embed_out", n): t.clone() for n, t in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
    for name in ("config.json", "model.safetensors.index.json"):
        (out / name).write_text((out / name).read_text().replace('"lm_head', '"embed_out'))
    (out / "report.json").unlink()  # it records the sizes of the files
    for load in (bitmill.load, theirs):
        assert torch.equal(load(out)(TOKENS).logits, expected)
    load(out).save_pretrained(tmp_path / "again")
    assert torch.equal(bitmill.load(tmp_path / "again")(TOKENS).logits, expected)


def test_too_few_blocks(tmp_path):
    tensors = save(tiny_model("llama"), tmp_path)
    rewrite(tmp_path, tensors | {"model.layers.2.input_layernorm.weight": torch.ones(32)})
    with pytest.raises(SourceError, match="has too few blocks"):
        StreamedModel(open_source(tmp_path))


def test_missing_package_of_code(tmp_path):
    save(tiny_model("llama"), tmp_path)
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (tmp_path / "modeling_own.py").write_text("import absent_package\n\n\nclass Own:\n    pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(SourceError, match="absent_package"):
        StreamedModel(open_source(tmp_path, trust_remote_code=True))
