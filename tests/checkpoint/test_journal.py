"""The journal lets an interrupted run continue, and refuses to mix two different runs."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from bitmill.checkpoint.journal import Journal, first_difference
from bitmill.checkpoint.work_folder import WorkFolder
from bitmill.checkpoint.writer import FolderSink
from bitmill.errors import CheckpointError
from bitmill.recipes.method import build_recipe
from bitmill.recipes.resolve import ResolvedRecipe

IDENTITY = {"model": "abc", "recipe": {"bits": 3, "ignore": ["*.x"]}, "threads": 1, "calibration": None}
LAYERS = {"model.layers.0.q": {"shape": [4, 8], "weight_error": 0.125, "output_error": None}}


@pytest.fixture
def work(tmp_path):
    """A work folder with a journal of two finished blocks."""
    journal = Journal(tmp_path, IDENTITY)
    for index in (1, 0):
        shard = tmp_path / f"shard{index}.safetensors"
        shard.write_bytes(bytes([index]) * 10)
        journal.add(index, shard, LAYERS)
    return tmp_path


def loaded(work, identity=IDENTITY):
    journal = Journal(work, identity)
    journal.load(work)
    return journal


def test_finished_blocks_reused(work):
    journal = loaded(work)
    assert sorted(journal.blocks) == [0, 1]
    assert journal.blocks[0]["file"] == "shard0.safetensors"
    assert journal.blocks[0]["layers"] == LAYERS


def test_saving_is_idempotent(work):
    before = (work / "journal.json").read_bytes()
    loaded(work).save()
    assert (work / "journal.json").read_bytes() == before
    assert not list(work.glob("*.tmp"))


def test_identity_round_trip(tmp_path):
    Journal(tmp_path, {"shape": (1, 2)}).save()  # JSON has no tuples
    loaded(tmp_path, {"shape": (1, 2)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"threads": 2}, "its threads was 1 and is now 2"),
        ({"recipe": {"bits": 4, "ignore": ["*.x"]}}, "its recipe.bits was 3 and is now 4"),
        ({"recipe": {"bits": 3, "ignore": []}}, r"its recipe.ignore was \['\*.x'\] and is now \[\]"),
        ({"calibration": {"seed": 0}}, "its calibration was None"),
        ({"new": 1}, "its new was None and is now 1"),
    ],
)
def test_other_job_refused(work, change, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        loaded(work, {**IDENTITY, **change})
    assert "\n" not in str(caught.value)


def test_altered_shard_refused(work):
    (work / "shard1.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"shard1.safetensors .* missing or altered"):
        loaded(work)


def test_missing_shard_refused(work):
    (work / "shard0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard0.safetensors .* missing or altered"):
        loaded(work)


def test_shard_outside_folder(work, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "shard0.safetensors"
    (work / "shard0.safetensors").rename(outside)
    path = work / "journal.json"
    path.write_text(path.read_text().replace('"shard0.safetensors"', json.dumps(str(outside))))
    with pytest.raises(CheckpointError, match="missing or altered"):
        loaded(work)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"identity": {}}', '{"blocks": []}', "\x00", "3"])
def test_damaged_journal_refused(work, text):
    (work / "journal.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        loaded(work)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("blocks", [3, [3], [{}], [{"index": 0}], [{"file": "x", "index": 0}], "no", None])
def test_damaged_entries_are_refused(work, blocks):
    (work / "journal.json").write_text(json.dumps({"identity": IDENTITY, "blocks": blocks}))
    with pytest.raises(CheckpointError):
        loaded(work)


@pytest.mark.parametrize("shape", [[4, 8, 8], [4], [0, 8], [4, "8"], 4, None])
def test_damaged_shapes_are_refused(work, shape):
    path = work / "journal.json"
    data = json.loads(path.read_text())
    data["blocks"][0]["layers"]["model.layers.0.q"]["shape"] = shape
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="cannot be read"):
        loaded(work)


@pytest.mark.parametrize("shared", [3, "no", [], {}, {"file": 3, "sha256": "0"}, {"file": "shard0.safetensors"}])
def test_damaged_shared_entry_refused(work, shared):
    (work / "journal.json").write_text(json.dumps({"identity": IDENTITY, "blocks": [], "shared": shared}))
    with pytest.raises(CheckpointError):
        loaded(work)


def test_missing_journal_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {}, None),
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"a": 2}, ("a", 1, 2)),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, ("a.b.c", 1, 2)),
        ({"a": 1, "b": 2}, {"a": 1}, ("b", 2, None)),
        ({"a": [1, 2]}, {"a": [1, 3]}, ("a", [1, 2], [1, 3])),
        ({"a": {"b": 1}}, {"a": None}, ("a", {"b": 1}, None)),
    ],
)
def test_first_difference(old, new, expected):
    assert first_difference(old, new) == expected


def test_refused_resume_unlocks(tmp_path):
    recipe = ResolvedRecipe(build_recipe("rtn"), {})
    with closing(WorkFolder(tmp_path / "out")) as work:
        FolderSink(work, recipe, {"seed": 1}, 1, resume=False).begin()
    with (
        closing(WorkFolder(tmp_path / "out")) as work,
        pytest.raises(CheckpointError, match="seed was 1 and is now 2"),
    ):
        FolderSink(work, recipe, {"seed": 2}, 1, resume=True)
    with closing(WorkFolder(tmp_path / "out")) as work:
        FolderSink(work, recipe, {"seed": 1}, 1, resume=True)
