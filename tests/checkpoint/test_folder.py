"""A finished folder: its recipe, its listed tensors, and no trace of the run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import bitmill
from bitmill.checkpoint.reader import Checkpoint, open_checkpoint
from bitmill.checkpoint.writer import is_finished
from bitmill.errors import CheckpointError, OutputError
from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    out = tmp_path_factory.mktemp("folder") / "out"
    bitmill.quantize(tiny_model("llama"), "rtn", out=out, bits=3, group_size=16, measure=0)
    return open_checkpoint(out)


def test_recipe_is_written(checkpoint):
    recipe = Recipe.from_yaml((checkpoint.folder / "recipe.yaml").read_text())
    assert recipe == build_recipe("rtn", {"bits": 3, "group_size": 16})


def test_no_work_folder_remains(checkpoint):
    assert [path.name for path in checkpoint.folder.parent.iterdir()] == ["out"]


def test_sizes_of_layers(checkpoint):
    """Bits per weight times weights are the bytes of each layer, also where a matrix is not square."""
    layers = list(checkpoint.layers())
    assert any(len(layer["shape"]) == 2 and len(set(layer["shape"])) == 2 for layer in layers)
    for layer in layers:
        bits = layer["bits_per_weight"] * math.prod(layer["shape"])
        assert bits == pytest.approx(8 * layer["size_bytes"]), layer["name"]
    stored = sum(entry.end - entry.begin for entry in checkpoint.entries.values())
    assert sum(layer["size_bytes"] for layer in layers) == stored


def test_index_has_total_size(checkpoint):
    index = json.loads(Path(checkpoint.folder / "model.safetensors.index.json").read_text())
    stored = sum(entry.end - entry.begin for entry in checkpoint.entries.values())
    assert index["metadata"]["total_size"] == stored
    assert set(index["weight_map"]) == set(checkpoint.entries)


def test_is_finished(checkpoint, tmp_path):
    identity = json.loads((checkpoint.folder / "report.json").read_text())["identity"]
    assert is_finished(checkpoint.folder, identity)
    assert not is_finished(tmp_path / "missing", identity)
    with pytest.raises(CheckpointError, match="recipe"):
        is_finished(checkpoint.folder, {**identity, "recipe": None})


@pytest.mark.parametrize("report", [None, "no json", "{}", "[]"])
def test_other_folder_is_not_finished(report, tmp_path):
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    with pytest.raises(OutputError, match="no finished bitmill folder"):
        is_finished(tmp_path, {})


@pytest.mark.parametrize("name", ["config.json", "report.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "holds list instead of an object"), ("{", "is not valid JSON"), (None, "is missing|There is no file")],
)
def test_damaged_document_refused(checkpoint, name, text, message, tmp_path):
    folder = shutil.copytree(checkpoint.folder, tmp_path / "out")
    (folder / name).unlink()
    if name == "report.json" and text is None:
        assert not open_checkpoint(folder).record
        return
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)
