"""One function opens every kind of model."""

from __future__ import annotations

import copy
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn

from bitmill.errors import MAX_QUOTED_CHARACTERS, SourceError, one_line
from bitmill.sources import zoo
from bitmill.sources.base import Source
from bitmill.sources.gguf import GgufSource
from bitmill.sources.hf import HfSource
from bitmill.sources.module import ModuleSource
from bitmill.sources.open import open_source
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import tiny_model


def refused(model, **kwargs) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(model, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_live_module(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    source = open_source(model)
    assert isinstance(source, ModuleSource)
    assert isinstance(source, Source)
    assert "lm_head.weight" not in source.names()
    state = model.state_dict()
    for name in source.names():
        assert torch.equal(source.tensor(name), state[name])
        assert (source.shape(name), source.dtype(name)) == (tuple(state[name].shape), torch.float32)
    source.tensor("model.norm.weight").zero_()
    assert model.model.norm.weight.abs().sum() > 0
    source.write_auxiliary_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["generation_config.json"]
    assert source.config is model.config


def test_live_module_tokenizer():
    model = tiny_model("llama")
    with pytest.raises(SourceError, match="has no tokenizer"):
        ModuleSource(model).tokenizer()
    tokenizer = object()
    assert ModuleSource(model, tokenizer=tokenizer).tokenizer() is tokenizer


def test_live_module_fingerprint():
    model = tiny_model("llama").bfloat16()
    other = copy.deepcopy(model)
    assert open_source(model).fingerprint() == open_source(other).fingerprint()
    other.model.norm.weight.data[0] += 1
    assert open_source(model).fingerprint() != open_source(other).fingerprint()


def test_plain_module():
    source = open_source(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    assert source.name == "Sequential"
    assert source.tensor("1.num_batches_tracked").shape == ()
    assert source.fingerprint()
    with pytest.raises(SourceError, match="no tensor 'x'"):
        source.tensor("x")


def test_meta_module_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert "'weight' has no data" in refused(model)


def test_folders_files_demo_names(tmp_path, monkeypatch):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "folder")
    path = write_gguf(tmp_path / "file.gguf", model)
    assert isinstance(open_source(tmp_path / "folder"), HfSource)
    assert isinstance(open_source(str(path)), GgufSource)
    monkeypatch.setattr(zoo, "fetch", lambda name: path)
    demo = open_source("smollm2-135m")
    assert isinstance(demo, GgufSource)
    assert demo.name == "smollm2-135m"


def test_not_a_model(tmp_path):
    assert "smollm2-135m" in refused("")
    (tmp_path / "x.txt").write_text("")
    assert "is a file but not a .gguf one" in refused(tmp_path / "x.txt")
    for mistyped in ("./model", "/nowhere/model", "gone.gguf", "a b", "a/b/c"):
        assert repr(mistyped) in refused(mistyped)
    assert "smollm2-135m" in refused(Path("org/name"))


def test_hub_download_patterns(tmp_path, monkeypatch):
    asked = []

    def download(model, *, revision, allow_patterns):
        asked.append(allow_patterns)
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refused("org/name")
    assert "'org/name'" in message
    assert "bitmill models" in message
    refused("org/name", trust_remote_code=True)
    assert "*.py" not in asked[0]
    assert "*.bin" not in asked[0]
    assert "*.py" in asked[1]


def test_hub_snapshot(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    tiny_model("llama").save_pretrained(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    source = open_source("org/name")
    assert source.name == "org/name"
    assert len(source.names()) == 21


@pytest.mark.parametrize(
    ("text", "quoted"),
    [("Two\n  lines.", "Two lines"), ("", "ValueError"), ("x" * 500, "x" * MAX_QUOTED_CHARACTERS + "...")],
)
def test_short_message(text, quoted):
    assert one_line(ValueError(text)) == quoted


def unreachable(*args, **kwargs):
    raise LocalEntryNotFoundError("no appropriate snapshot folder") from ConnectionError("Name not known")


def unknown(*args, **kwargs):
    response = type("Response", (), {"headers": {}, "request": None})()
    raise RepositoryNotFoundError("Repository Not Found", response=response) from ValueError("status 404")


@pytest.mark.parametrize(("answer", "words"), [(unreachable, "Name not known"), (unknown, "Repository Not Found")])
def test_hub_error_message(answer, words, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    assert f"could not be fetched from the Hub ({words}); check the name" in refused("org/name")
