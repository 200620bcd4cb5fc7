"""A folder becomes a GGUF file that bitmill's own reader opens with equal logits, tokens and config."""

from __future__ import annotations

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import bitmill
from bitmill.errors import UsageError
from helpers.tiny_models import tiny_model

TEXT = "The mill by the river grinds bits to 3 or 4, and writes them down: one file, one model."
WINDOWS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(7))
TOKENS = torch.arange(24).view(2, 12) + 3
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}


def bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<|end|>", "<|user|>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


def packed(tmp_path, model_type: str, **options):
    float_model(tmp_path, model_type)
    bitmill.quantize(
        tmp_path / "float", "gptq", out=tmp_path / "packed", calib=WINDOWS, measure=0, group_size=32, **options
    )
    return tmp_path / "packed"


def float_model(tmp_path, model_type: str) -> None:
    tiny_model(model_type, **SIZES).save_pretrained(tmp_path / "float")
    bpe().save_pretrained(tmp_path / "float")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_round_trip(tmp_path, model_type):
    folder = packed(tmp_path, model_type, bits=3)
    outcome = bitmill.export(folder, "gguf")
    assert outcome.out == tmp_path / "packed.gguf"
    assert "stored as Q4_0" in str(outcome)
    expected = logits(bitmill.load(folder, dense=True))
    assert torch.allclose(logits(bitmill.load(outcome.out)), expected, atol=2e-2 * float(expected.abs().max()))
    fields = gguf.GGUFReader(outcome.out).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0]['content'] }}"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 128
    if model_type == "llama":  # transformers has pre-tokenizers of its own for others
        assert bitmill.load_tokenizer(outcome.out)(TEXT)["input_ids"] == bpe()(TEXT)["input_ids"]


@pytest.mark.parametrize(("kind", "instead"), [("Q4_K", "Q5_0"), ("Q3_K", "IQ4_NL"), ("Q5_K", "Q5_1")])
def test_block_types(tmp_path, kind, instead):
    """Layers of 256 columns have the type, and those of 128 the one that takes its place."""
    float_model(tmp_path, "llama")
    made = bitmill.quantize(
        tmp_path / "float", "gguf", type=kind, out=tmp_path / "packed", calib=WINDOWS, measure=0
    )
    assert "their columns are no whole blocks" in str(made)
    outcome = bitmill.export(tmp_path / "packed", "gguf")
    reader = gguf.GGUFReader(outcome.out)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and "norm" not in tensor.name:
            assert tensor.tensor_type.name == (kind if "ffn_down" in tensor.name else instead)
    expected = logits(bitmill.load(tmp_path / "packed", dense=True))
    assert torch.allclose(logits(bitmill.load(outcome.out)), expected, atol=2e-2 * float(expected.abs().max()))
    imported = bitmill.import_checkpoint(outcome.out, out=tmp_path / "imported")
    assert imported.out.is_dir()
    again = logits(bitmill.load(tmp_path / "imported", dense=True))
    assert torch.allclose(again, expected, atol=2e-2 * float(expected.abs().max()))


def test_refused(tmp_path):
    folder = packed(tmp_path, "llama", bits=8)
    with pytest.raises(UsageError, match=r"gguf cannot hold the layer .* beyond a byte"):
        bitmill.export(folder, "gguf")
    bitmill.quantize(tiny_model("opt"), "rtn", bits=4, out=tmp_path / "opt", measure=0)
    with pytest.raises(UsageError, match="Models of type 'opt' are not exported to gguf"):
        bitmill.export(tmp_path / "opt", "gguf")
    (tmp_path / "of_gemma").mkdir()
    with pytest.raises(UsageError, match="from a demo model"):
        bitmill.export(packed(tmp_path / "of_gemma", "gemma3_text", bits=3), "gguf")
    assert not list(tmp_path.rglob("*.gguf"))
    assert not list(tmp_path.glob(".*"))


def test_rotary_factors_of_other_constants(tmp_path):
    """The file holds by how much each frequency of the model is divided, whatever the constants."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model("llama", **SIZES, rope_parameters=rope)
    model.save_pretrained(tmp_path / "float")
    bpe().save_pretrained(tmp_path / "float")
    bitmill.quantize(tmp_path / "float", "rtn", bits=3, group_size=32, out=tmp_path / "packed", measure=0)
    outcome = bitmill.export(tmp_path / "packed", "gguf")
    (factors,) = (t.data for t in gguf.GGUFReader(outcome.out).tensors if t.name == "rope_freqs.weight")
    plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(factors), model.model.rotary_emb.inv_freq, rtol=1e-5)
