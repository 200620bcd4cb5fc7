"""A safetensors folder is read lazily; damaged folders are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel
from bitmill.sources.base import Source
from bitmill.sources.hf import INDEX, HfSource
from bitmill.sources.open import open_source
from helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may damage: one file of weights."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((saved / "config.json").read_bytes())
    tensors = {}
    for shard in sorted(saved.glob("*.safetensors")):
        tensors |= load_file(shard)
    save_file(tensors, model / "model.safetensors")
    return model


def refused(folder: Path, **kwargs) -> str:
    with pytest.raises(SourceError) as caught:
        HfSource(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_sharded_folder(saved):
    source = open_source(str(saved))
    assert isinstance(source, Source)
    assert len(list(saved.glob("*.safetensors"))) > 1
    expected = tiny_model("llama").state_dict()
    assert set(source.names()) == set(expected)
    for name in source.names():
        tensor = source.tensor(name)
        assert torch.equal(tensor, expected[name])
        assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert source.config.model_type == "llama"
    assert source.name == saved.name


def test_tied_head_not_listed(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in HfSource(tmp_path).names()


def test_fingerprint(folder):
    first = HfSource(folder).fingerprint()
    assert first == HfSource(folder).fingerprint()
    assert len(first) == 64
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    second = HfSource(folder).fingerprint()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert len({first, second, HfSource(folder).fingerprint()}) == 3


def test_unknown_tensor_message(folder):
    with pytest.raises(SourceError, match=r"no tensor 'model\.nope'"):
        HfSource(folder).tensor("model.nope")


def test_base_model_prefix(tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in stored.items()}, tmp_path / "model.safetensors")
    names = StreamedModel(HfSource(tmp_path)).names()
    assert set(names) <= set(model.state_dict())
    assert "transformer.h.0.attn.c_attn.weight" in names


def test_side_files(folder, tmp_path):
    for name in ("tokenizer.json", "LICENSE", "generation_config.json", "chat_template.jinja", "modeling.py"):
        (folder / name).write_text(name)
    for name in (
        "pytorch_model.bin",
        "old.pt",
        "model.gguf",
        ".gitattributes",
        INDEX.replace("model", "other"),
    ):
        (folder / name).write_text("no")
    (folder / "README.md").write_text("# the source")
    for name in (
        "additional_chat_templates/tools.jinja",
        "code/part/layers.py",
        "logs/events.out",
        "__pycache__/a.py",
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(name)
    for name in ("checkpoint-5/trainer.json", "checkpoint-5/model.safetensors", "hf_quant_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "linked.txt").symlink_to(secret)
    out = tmp_path / "out"
    out.mkdir()
    HfSource(folder).write_auxiliary_files(out)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "LICENSE",
        "README.md",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "code/part/layers.py",
        "generation_config.json",
        "modeling.py",
        "tokenizer.json",
    ]


def test_missing_tokenizer_message(folder):
    with pytest.raises(SourceError, match=r"no tokenizer that can be loaded \(.*\); copy"):
        HfSource(folder).tokenizer()


def test_missing_config(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{nope", "not valid JSON"),
        ("[1]", "instead of an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model_type": "martian"}', "martian"),
        ("{}", "describes no model"),
        ('{"model_type": "llama", "hidden_size": "many"}', "hidden_size"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            "already quantized by gptq",
        ),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "allow remote code"),
    ],
)
def test_bad_configs(folder, text, fragment):
    (folder / "config.json").write_text(text)
    assert fragment in refused(folder)


def test_no_remote_code(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}')
    refused(folder)
    assert not marker.exists()


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}}, 8, "file not fully covered"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, 12, "invalid offset for tensor `b`"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, 20, "invalid offset for tensor `b`"),
        ({"a": GOOD}, 12, "file not fully covered"),
        ({"a": {**GOOD, "dtype": "F3"}}, 8, "unknown variant `F3`"),
        ({"a": {**GOOD, "dtype": "F8_E8M0", "shape": [8]}}, 8, "stores the tensor 'a' as F8_E8M0"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, 8, "invalid type"),
        ({"a": {**GOOD, "shape": [-2]}}, 8, "integer `-2`"),
        ({"a": {**GOOD, "shape": [3]}}, 8, "invalid shape"),
        ({"a": {**GOOD, "shape": [1 << 62, 1 << 62]}}, 8, "overflow"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, 8, "invalid offset for tensor `a`"),
        ({"a": {**GOOD, "data_offsets": [0]}}, 8, "invalid length 1"),
        ({"a": 3}, 0, "integer `3`"),
        ([1], 0, "invalid type: sequence"),
        (b"{nope", 0, "invalid JSON"),
        (b"\xff\xff", 0, "invalid UTF-8"),
        (b"[" * 100_000, 0, "invalid JSON"),
    ],
)
def test_bad_headers(folder, header, size, message):
    write_header(folder / "model.safetensors", header, bytes(size))
    assert message in refused(folder)


@pytest.mark.parametrize("length", [0xFFFFFFFFFFFFFFFF, 1 << 40, 200_000_000, 50])
def test_absurd_header_length(folder, length):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert "model.safetensors is not a valid safetensors file" in refused(folder)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors is not a valid safetensors file" in refused(folder)


def make_index(folder: Path, weight_map: object) -> None:
    """Index the weights under another name, because one model.safetensors is read before an index."""
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_index_outside_folder(folder, shard):
    make_index(folder, {"a": shard})
    assert f"{shard!r}" in refused(folder)


def test_bad_indexes(folder):
    make_index(folder, {"a": "gone.safetensors"})
    assert "lacks the shard 'gone.safetensors'" in refused(folder)
    make_index(folder, {"absent": "a.safetensors"})
    assert "lacks the tensor 'absent'" in refused(folder)
    make_index(folder, [])
    assert "no weight_map" in refused(folder)


def test_linked_shards(folder, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert "link out of its folder" in refused(snapshot)
    source = HfSource(snapshot, name="org/name", hub=True)
    assert source.tensor("model.norm.weight").shape == (32,)
    outside = tmp_path / "outside.safetensors"
    (blobs / "1").rename(outside)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside)
    assert "outside" in refused(snapshot, hub=True)


def test_pickles_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "bitmill never unpickles" in refused(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights" in refused(folder)


def test_shards_without_index(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert HfSource(folder).names()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "of which transformers reads pytorch_model.bin" in refused(folder)
    (folder / "pytorch_model.bin").unlink()
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    assert "2 safetensors files and no" in refused(folder)


def test_one_file_before_index(folder):
    """As in transformers, also where the index names other shards."""
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    source = HfSource(folder)
    assert source.names()
    assert [shard.name for shard in source._shards] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized by fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantized by compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "quantized by gptq"),
        ({"transformers_weights": "../model.safetensors"}, "inside it"),
        ({"transformers_weights": "none.safetensors"}, "lacks the shard"),
    ],
)
def test_other_weights_named_by_the_config(folder, changes, fragment):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert fragment in refused(folder)


def test_weights_named_by_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "b.safetensors"}))
    (folder / "b.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert [shard.name for shard in HfSource(folder)._shards] == ["b.safetensors"]


def test_adapter_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "not merged" in refused(folder)


def test_random_damage(folder):
    path = folder / "model.safetensors"
    sound, messages = path.read_bytes(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        data = bytearray(sound)
        for at in torch.randint(0, 1500, (3,), generator=generator).tolist():
            data[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path.write_bytes(data)
        try:
            source = HfSource(folder)
            for name in source.names():
                source.tensor(name)
        except SourceError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)
