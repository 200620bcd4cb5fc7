"""Converted tokenizers are kept in the cache, and made again where they were damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmill.sources import gguf_tokenizer
from bitmill.sources.gguf import GgufSource
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import tiny_model

TEXT = "<s>the a\n heather</s>"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_tokenizer, "SMALLEST_BYTES", 0)
    return tmp_path / "cache" / "tokenizers"


@pytest.fixture
def file(tmp_path) -> Path:
    return write_gguf(tmp_path / "model.gguf", tiny_model("llama"))


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """The files whose tokenizer was converted."""
    seen: list[Path] = []
    convert = gguf_tokenizer._convert
    monkeypatch.setattr(gguf_tokenizer, "_convert", lambda path: (seen.append(path), convert(path))[1])
    return seen


def saved(tokenizer, folder: Path) -> dict[str, bytes]:
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kept_tokenizer_is_equal(file, cache, conversions, tmp_path):
    converted, kept = GgufSource(file).tokenizer(), GgufSource(file).tokenizer()
    assert conversions == [file]
    assert kept(TEXT) == converted(TEXT)
    assert kept.decode(kept(TEXT).input_ids) == converted.decode(converted(TEXT).input_ids)
    assert (kept.bos_token_id, kept.eos_token_id) == (converted.bos_token_id, converted.eos_token_id)
    assert saved(kept, tmp_path / "kept") == saved(converted, tmp_path / "converted")


def test_copy_of_a_file_shares_the_entry(file, cache, conversions, tmp_path):
    GgufSource(file).tokenizer()
    other = tmp_path / "other" / "copy.gguf"
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    GgufSource(other).tokenizer()
    assert conversions == [file]


def test_other_metadata(file, cache, conversions, tmp_path):
    GgufSource(file).tokenizer()
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(b"[unused0]", b"[unused9]"))
    assert "[unused0]" not in GgufSource(other).tokenizer().get_vocab()
    assert conversions == [file, other]


@pytest.mark.parametrize("damage", ["changed", "absent", "no digest"])
def test_damaged_entry_made_again(file, cache, conversions, damage):
    ids = GgufSource(file).tokenizer()(TEXT).input_ids
    (entry,) = cache.iterdir()
    vocabulary = entry / "files" / "tokenizer.json"
    if damage == "changed":
        vocabulary.write_text(vocabulary.read_text().replace("[unused0]", "[unused9]"))
    elif damage == "absent":
        vocabulary.unlink()
    else:
        (entry / "sha256").unlink()
    assert GgufSource(file).tokenizer()(TEXT).input_ids == ids
    GgufSource(file).tokenizer()
    assert conversions == [file, file]


def test_unwritable_cache(file, cache, conversions):
    cache.parent.write_text("a file where a folder should be")
    assert GgufSource(file).tokenizer()(TEXT) == GgufSource(file).tokenizer()(TEXT)
    assert conversions == [file, file]


def test_small_metadata_not_kept(file, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("BITMILL_CACHE", str(cache.parent))
    GgufSource(file).tokenizer()
    assert not cache.exists()
