"""A GGUF file restores the model that it was written from; damaged files are refused."""

from __future__ import annotations

import struct

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitmill
import bitmill.progress
from bitmill.errors import SourceError
from bitmill.sources import gguf_header
from bitmill.sources.base import Source
from bitmill.sources.gguf import GgufSource
from bitmill.sources.gguf_architectures import llama3_factors
from bitmill.sources.open import open_source
from helpers.tiny_gguf import decoded, interleave, write_gguf
from helpers.tiny_models import tiny_model

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2"]
TOKENS = torch.arange(24).view(2, 12) + 3


def refused(path) -> str:
    with pytest.raises(SourceError) as caught:
        GgufSource(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama", tie_word_embeddings=True, intermediate_size=64)


@pytest.fixture
def file(tiny, tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", tiny)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_model_round_trip(model_type, tmp_path):
    model = tiny_model(model_type, **({"query_pre_attn_scalar": 8} if model_type.startswith("gemma") else {}))
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", model))
    weights = {name: source.tensor(name) for name in source.names()}
    assert all(source.shape(n) == tuple(t.shape) and source.dtype(n) == t.dtype for n, t in weights.items())
    back = AutoModelForCausalLM.from_config(source.config).float().eval()
    missing = back.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    back.tie_weights()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(back.state_dict()[name], tensor, atol=2e-7), name
    assert torch.allclose(back(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_biases_are_reordered(tmp_path):
    model = tiny_model("llama", attention_bias=True)
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", model))
    assert source.config.attention_bias
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(source.tensor(name), model.state_dict()[name])


def test_quantized_types_are_pointed_out(tiny, tmp_path):
    kinds = {f"blk.{block}.ffn_{part}.weight": "Q4_0" for block in (0, 1) for part in ("up", "gate", "down")}
    file = write_gguf(tmp_path / "tiny.gguf", tiny, kinds=kinds)
    first, *others = GgufSource(file).stored_types()
    notes: list[str] = []

    class Notes(bitmill.progress.Progress):
        def note(self, sentence: str) -> None:
            notes.append(sentence)

    outcome = bitmill.quantize(file, "rtn", out=tmp_path / "out", measure=0, progress=Notes())
    assert (first.type, first.bits_per_weight) == ("Q4_0", 4.5)
    assert first.share + sum(other.share for other in others) == pytest.approx(1)
    assert any(f"is already quantized: it has {first.share:.1%} of its weights in Q4_0" in note for note in notes)
    assert outcome.report["source_types"][0] == {"type": "Q4_0", "bits_per_weight": 4.5, "share": first.share}
    assert GgufSource(write_gguf(tmp_path / "float.gguf", tiny)).stored_types() == []


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_stored_types(kind, tiny, tmp_path):
    name, ours = "blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight"
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", tiny, kinds={name: kind}))
    dtype = torch.bfloat16 if kind == "BF16" else torch.float16
    assert source.config.dtype == source.dtype(ours) == dtype
    there = torch.from_numpy(decoded(tiny, name, kind).astype("float32"))
    assert torch.equal(interleave(source.tensor(ours).float(), 4), there.to(dtype).float())


def test_partial_rows(tiny, file, monkeypatch):
    whole = GgufSource(file).tensor("model.embed_tokens.weight")
    monkeypatch.setattr("bitmill.sources.gguf.CHUNK_ELEMENTS", 100)
    assert torch.equal(GgufSource(file).tensor("model.embed_tokens.weight"), whole)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q8_K", "I8"])
def test_super_blocks(kind, tmp_path):
    model = tiny_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    name, number = "blk.0.ffn_down.weight", gguf.GGMLQuantizationType[kind]
    at = path.read_bytes().index(name.encode()) + len(name) + 4 + 16
    data = bytearray(path.read_bytes())
    data[at : at + 4] = struct.pack("<I", number)
    path.write_bytes(data)
    source, ours = GgufSource(path), "model.layers.0.mlp.down_proj.weight"
    if kind in ("Q8_K", "I8"):
        with pytest.raises(SourceError, match=f"'{name}' is stored as {kind}, which cannot be dequantized"):
            source.tensor(ours)
        return
    stored = gguf_header.read_header(path).tensors[name]
    # bytes below 60 make every float16 scale finite
    raw = torch.randint(0, 60, (stored.size_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patched(path, stored.offset, raw.numpy().tobytes())
    expected = gguf.quants.dequantize(raw.numpy(), number).reshape(256, 256)
    assert torch.equal(source.tensor(ours), torch.from_numpy(expected).half())


def test_metadata_to_config(tiny, file):
    config = GgufSource(file).config
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, None)
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == tiny.config.rms_norm_eps
    assert (config.vocab_size, config.head_dim, config.max_position_embeddings) == (128, 8, 64)


def test_rope_scaling(tiny, tmp_path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base": 5e5}
    config = GgufSource(write_gguf(tmp_path / "a.gguf", tiny, **linear)).config
    assert config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    yarn["rope.scaling.original_context_length"] = 32
    config = GgufSource(write_gguf(tmp_path / "b.gguf", tiny, **yarn)).config
    assert config.rope_parameters["original_max_position_embeddings"] == 32
    assert "'longrope'" in refused(write_gguf(tmp_path / "c.gguf", tiny, **{"rope.scaling.type": "longrope"}))


def test_llama3_rope_scaling(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model("llama", rope_parameters=rope, head_dim=64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 5e5 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = (plain / scaled).float()
    assert torch.allclose(factors.double(), llama3_factors(5e5, 64, 32.0), rtol=1e-4)
    theta = {"rope.freq_base": 5e5}
    path = write_gguf(tmp_path / "a.gguf", model, extra={"rope_freqs.weight": factors}, **theta)
    assert GgufSource(path).config.rope_parameters == rope
    path = write_gguf(tmp_path / "b.gguf", model, extra={"rope_freqs.weight": factors.flip(0)}, **theta)
    assert "rotary factors" in refused(path)


def test_tokenizer_and_side_files(file, tmp_path):
    source = open_source(str(file))
    assert isinstance(source, Source)
    ids = source.tokenizer()("the a").input_ids
    assert source.tokenizer().decode(ids) == "the a"
    out = tmp_path / "out"
    out.mkdir()
    source.write_auxiliary_files(out)
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {p.name for p in out.iterdir()} == expected
    source.config.save_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("the a").input_ids == ids
    assert source.fingerprint() == GgufSource(file).fingerprint()


def test_unknown_names(file, tmp_path):
    with pytest.raises(SourceError, match="no tensor 'nope'"):
        GgufSource(file).tensor("nope")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "architecture 'mamba'" in refused(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"block_count": 3}, "announces 3 blocks and holds tensors of 2"),
        ({"block_count": 2_000_000_000}, "gives 'num_hidden_layers' as 2000000000, more than any model has"),
        ({"block_count": None}, "llama.block_count is None"),
        ({"attention.head_count": 0}, "head_count is 0"),
        ({"attention.head_count": 5}, "not a multiple"),
        ({"attention.head_count": 8}, "'blk.0.attn_q.weight' has the shape (32, 32)"),
        ({"embedding_length": "x"}, "embedding_length is 'x'"),
        ({"embedding_length": 64}, "'token_embd.weight' has the shape (128, 32)"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"expert_count": 8}, "mixture of 8 experts"),
    ],
)
def test_inconsistent_metadata(tiny, tmp_path, changes, fragment):
    assert fragment in refused(write_gguf(tmp_path / "tiny.gguf", tiny, **changes))


def patched(file, at: int, raw: bytes):
    data = bytearray(file.read_bytes())
    data[at : at + len(raw)] = raw
    file.write_bytes(data)
    return file


U64_MAX = 2**64 - 1


@pytest.mark.parametrize(
    ("at", "raw", "fragment"),
    [
        (0, b"GGML", "starts with b'GGML'"),
        (4, struct.pack("<I", 1), "version is 1"),
        (4, struct.pack(">I", 3), "version is 50331648"),
        (8, struct.pack("<Q", U64_MAX), f"announces {U64_MAX} tensors"),
        (8, struct.pack("<Q", 1 << 40), "tensors, more than"),
        (16, struct.pack("<Q", U64_MAX), f"announces {U64_MAX} key/value pairs"),
        (24, struct.pack("<Q", 1 << 62), "bytes for a key"),
        (32, b"\xff\xfe", "not valid UTF-8"),
    ],
)
def test_absurd_headers(file, at, raw, fragment):
    assert fragment in refused(patched(file, at, raw))


def test_absurd_values(file):
    data = file.read_bytes()
    tokens = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    cases = [
        (tokens + 8, struct.pack("<Q", 1 << 50), "strings for 'tokenizer.ggml.tokens'"),
        (tokens + 4, struct.pack("<I", 9), "unknown element type 9"),
        (tokens, struct.pack("<I", 77), "unknown value type 77"),
        (tokens + 16, struct.pack("<Q", 1 << 33), "bytes for a string of"),
    ]
    entry = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    cases += [
        (entry, struct.pack("<I", 1 << 31), "has 2147483648 dimensions"),
        (entry + 4, struct.pack("<Q", 1 << 60), "ends at byte"),
        (entry + 4, struct.pack("<Q", 0), "cannot have the shape (32, 0)"),
        (entry + 20, struct.pack("<I", 250), "unknown type 250"),
        (entry + 20, struct.pack("<I", 12), "Q4_K tensor"),
        (entry + 24, struct.pack("<Q", 1 << 63), "ends at byte"),
        (entry + 24, struct.pack("<Q", 0), "overlap"),
        (entry - 8, b"9", "no counterpart in a llama model"),
    ]
    for at, raw, fragment in cases:
        file.write_bytes(data)
        assert fragment in refused(patched(file, at, raw))


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.3, 0.9, 0.99999])
def test_truncated_files(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert "is not a valid GGUF file" in refused(file)


def test_random_damage(file):
    sound = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = sound.index(b"output_norm.weight")
    outcomes, messages = set(), []
    for _ in range(150):
        data = bytearray(sound)
        for at in torch.randint(0, header, (2,), generator=generator).tolist():
            data[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        file.write_bytes(data)
        try:
            source = GgufSource(file)
            for name in source.names():
                source.tensor(name)
            outcomes.add("read")
        except SourceError as error:
            outcomes.add("refused")
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    assert outcomes == {"read", "refused"}


def test_missing_tokenizer_message(file):
    data = file.read_bytes()
    file.write_bytes(data.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modem"))
    with pytest.raises(SourceError, match="describes no tokenizer"):
        GgufSource(file).tokenizer()
