"""The licence of a model comes from its card, its GGUF file, or the catalog of demo models."""

from __future__ import annotations

import pytest

from bitmill.sources.gguf import GgufSource
from bitmill.sources.hf import HfSource
from bitmill.sources.module import ModuleSource
from bitmill.sources.published import published_metadata
from bitmill.sources.zoo import SMOLLM2_135M
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(saved)
    return saved


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (
            "---\nlicense: mit\nlanguage: [en, de]\ntags: [a]\n---\n# Model\n",
            {"license": "mit", "language": ["en", "de"]},
        ),
        ("---\nlicense: {a: b}\npipeline_tag: ''\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("license: mit\n", {}),
        ("---\nlicense: " + "x" * 301 + "\n---\n", {}),
        (None, {}),
    ],
)
def test_card_of_a_folder(folder, card, found):
    file = folder / "README.md"
    file.unlink(missing_ok=True)
    if card is not None:
        file.write_text(card)
    assert published_metadata(HfSource(folder)) == found


def test_gguf_file(tmp_path):
    model = tiny_model("llama")
    source = GgufSource(write_gguf(tmp_path / "model.gguf", model))
    assert published_metadata(source) == {}
    source._header.metadata["general.license"] = "mit"
    assert published_metadata(source) == {"license": "mit"}
    assert published_metadata(ModuleSource(model)) == {}


def test_demo_model(folder, tmp_path, monkeypatch):
    """A folder that has the name of a demo model is not that model."""
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path))
    (folder / "README.md").unlink(missing_ok=True)
    source = HfSource(folder, name="smollm2-135m")
    assert published_metadata(source) == {}
    source.folder = SMOLLM2_135M.cached
    expected = {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
    assert published_metadata(source) == expected
