"""The pooling of a folder is read or refused."""

from __future__ import annotations

import json

import pytest

from bitmill.errors import SourceError
from bitmill.sources.pooling import read_pooling

MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


def described(folder, modules=MODULES, **flags):
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **flags}))
    return folder


def refused(folder) -> str:
    with pytest.raises(SourceError) as caught:
        read_pooling(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_default_is_mean(tmp_path):
    assert read_pooling(tmp_path) == "mean"


FLAGS = ("mean_tokens", "cls_token", "max_tokens")


@pytest.mark.parametrize("flag", FLAGS)
def test_pooling_is_read(tmp_path, flag):
    flags, pooling = {f"pooling_mode_{name}": name == flag for name in FLAGS}, flag.partition("_")[0]
    assert read_pooling(described(tmp_path, **flags)) == pooling


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"pooling_mode_lasttoken": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
    ],
)
def test_other_poolings_refused(tmp_path, flags):
    assert "--measure 0" in refused(described(tmp_path, **flags))


def test_extra_modules_refused(tmp_path):
    modules = [*MODULES, ("3_Dense", "Dense")]
    assert "'Dense'" in refused(described(tmp_path, modules, pooling_mode_mean_tokens=True))


@pytest.mark.parametrize("path", ["..", "/etc", "a/b", None])
def test_modules_outside_folder(tmp_path, path):
    assert "inside its folder" in refused(described(tmp_path, [(path, "Pooling")]))


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_damaged_description_refused(tmp_path, text):
    (tmp_path / "modules.json").write_text(text)
    refused(tmp_path)
