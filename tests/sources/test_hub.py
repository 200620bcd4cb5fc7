"""Models on the Hub, read from a cache folder without a network."""

from __future__ import annotations

import functools
import json

import huggingface_hub
import pytest

import bitmill
from bitmill.errors import SourceError
from bitmill.report.card import model_card
from bitmill.sources.hub import HubOrigin, is_hub_id, origin_of_folder, split_revision
from bitmill.sources.open import open_source
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model, write_text

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache with org/name at two commits, OLD with the tag v1 and NEW on the branch main."""
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    for commit, ref, seed in ((OLD, "v1", 0), (NEW, "main", 1)):
        save_model(folder / "snapshots" / commit, seed=seed)
        (folder / "refs" / ref).write_text(commit)
    offline = functools.partial(
        huggingface_hub.snapshot_download, cache_dir=tmp_path / "hub", local_files_only=True
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return folder


@pytest.mark.parametrize(
    ("model", "commit", "revision"),
    [("org/name", NEW, None), ("org/name@v1", OLD, "v1"), (f"org/name@{OLD}", OLD, OLD)],
)
def test_revisions(cache, model, commit, revision):
    source = open_source(model)
    assert source.name == model
    assert source.folder == cache / "snapshots" / commit
    assert source.origin == HubOrigin("org/name", revision, commit)


def test_unknown_revision(cache):
    with pytest.raises(SourceError, match="'org/name@v9' is no local path"):
        open_source("org/name@v9")


@pytest.mark.parametrize("revision", ["", "a b", "a..b", "x@y"])
def test_no_revision(revision):
    with pytest.raises(SourceError, match="write org/name@revision"):
        split_revision(f"org/name@{revision}")


def test_ids():
    assert split_revision("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    assert is_hub_id("org/name@v1.0")
    assert not is_hub_id("./name@v1")
    assert not is_hub_id("a/b/c@v1")


def test_folder_named_like_a_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("org/name@v1")
    source = open_source("org/name@v1")
    assert (source.name, source.origin) == ("name@v1", None)


def test_origin_of_folders(cache, tmp_path):
    assert origin_of_folder(cache / "snapshots" / OLD) == HubOrigin("org/name", None, OLD)
    downloaded = tmp_path / "downloaded"
    metadata = downloaded / ".cache" / "huggingface" / "download" / "config.json.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"{NEW}\netag\n1700000000.0\n")
    assert origin_of_folder(downloaded) == HubOrigin(None, None, NEW)
    metadata.write_text("x")
    assert origin_of_folder(downloaded) is None


def test_commit_is_recorded(cache, tmp_path):
    text = write_text(tmp_path / "text.txt")
    calib = bitmill.CalibrationData(str(text), samples=2, seqlen=16)
    out = tmp_path / "out"
    bitmill.quantize("org/name@v1", "rtn", out=out, calib=calib, measure=0)
    report = json.loads((out / "report.json").read_text())
    assert report["source"] == "org/name@v1"
    assert report["hub"] == {"id": "org/name", "revision": "v1", "commit": OLD}
    assert "base_model: org/name\n" in (out / "README.md").read_text()
    assert "base_model: org/name\n" in model_card(report)
