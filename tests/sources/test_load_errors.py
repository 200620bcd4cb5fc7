"""Errors of transformers about a folder become one sentence, and the network is not used."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import transformers

import bitmill
from bitmill.errors import CheckpointError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitmill"}}))
    sound = SimpleNamespace(
        config={"model_type": "llama"}, folder=tmp_path, record={}, files={}, formats={}, entries={}
    )
    monkeypatch.setattr("bitmill.workflows.load.open_checkpoint", lambda folder, **options: sound)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "load"),
    [
        ("tokenizer", "AutoTokenizer", bitmill.load_tokenizer),
        ("model", "AutoModelForCausalLM", bitmill.load),
    ],
)
@pytest.mark.parametrize(
    ("raised", "advice"),
    [
        (KeyError("frobnicator"), "copy the folder again"),
        (ValueError("pass the argument\n`trust_remote_code=True`."), "--trust-remote-code"),
    ],
)
def test_one_sentence(folder, monkeypatch, name, kind, load, raised, advice):
    def fail(cls, path, **options):
        assert options["local_files_only"]
        assert options["trust_remote_code"] is False
        raise raised

    monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", classmethod(fail))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert f"The {name} of {folder} cannot be loaded" in message
    assert advice in message
    assert "\n" not in message


def test_own_errors_unchanged(folder, monkeypatch):
    def fail(cls, path, **options):
        raise CheckpointError("Ours.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", classmethod(fail))
    with pytest.raises(CheckpointError, match=r"^Ours\.$"):
        bitmill.load(folder)
