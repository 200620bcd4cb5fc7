"""Every module that reads files has a reader among those that `make fuzz` damages files of."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from fuzz.corpus import READERS
from fuzz.mutations import change_bytes, change_json, change_safetensors, change_text, change_yaml, mutate

SOURCE = Path(__file__).parents[2] / "src" / "bitmill"
READS = {"read_text", "read_bytes", "safe_open", "load_file", "read_document", "from_pretrained"}
OWN_FILES = {  # that come with bitmill or the machine, or are compared with a digest before they are read
    "formats/integer_coding.py",
    "progress/base.py",
    "runtime/kernels/mapped.py",
    "workflows/comparison/pictures.py",
    "recipes/defaults.py",
    "report/html.py",
    "sensitivities/taylor.py",
    "workflows/budget/correct.py",
    "checkpoint/trained.py",
    "checkpoint/training_journal.py",
    "sources/gguf_tokenizer.py",
    "sources/zoo.py",
    "sources/whisper.py",
    "config/listing.py",
    "data/archive.py",
    "data/domains/code.py",
    "workflows/doctor.py",
    "workflows/bench/memory.py",
    "workflows/machine.py",
}


def reads(file: Path) -> bool:
    """Return True if a module calls something that reads a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            is_binary = name == "open" and any(getattr(arg, "value", "") == "rb" for arg in node.args)
            is_array = name == "load" and ast.unparse(node.func) == "np.load"
            if name in READS or is_binary or is_array:
                return True
    return False


def test_every_reader_has_a_corpus():
    named = {module for reader in READERS.values() for module in reader.modules}
    found = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py") if reads(file)}
    assert found - named - OWN_FILES == set(), "register a Reader in tests/fuzz/corpus.py"
    assert all((SOURCE / module).is_file() for module in named | OWN_FILES)


@pytest.mark.parametrize("change", [change_bytes, change_json, change_safetensors, change_text, change_yaml])
def test_mutations(change):
    """They change the file, by the seed alone."""
    content = b'{"a": [1, {"b": null}, "x"], "c": 1.5}'
    if change is change_safetensors:
        content = len(content).to_bytes(8, "little") + content + bytes(64)
    made = [change(content, random.Random(seed)) for seed in range(40)]
    assert made == [change(content, random.Random(seed)) for seed in range(40)]
    assert sum(one != content for one in made) > 30
    assert len(set(made)) > 20


def test_places(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    kept = tmp_path / "kept.json"
    names = set()
    for seed in range(900):
        path = tmp_path / f"{seed}.json"
        kept.unlink(missing_ok=True)
        kept.write_text("{}")
        path.hardlink_to(kept)
        names.add(mutate(path, random.Random(seed)))
        assert kept.read_text() == "{}"  # what it was linked from stays
    assert names == {
        "change_json",
        "remove",
        "make_folder",
        "make_fifo",
        "make_loop",
        "make_device",
        "make_empty",
        "forbid",
    }
