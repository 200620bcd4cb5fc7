"""--activations chooses the rounding of one command and is gone after it."""

from __future__ import annotations

import json
import os

import pytest

from bitmill.cli.main import main
from helpers.workspace import arguments, save_model, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("activations")
    text = write_text(place / "text.txt")
    assert main(arguments(save_model(place / "source"), text, place / "out")) == 0
    return place


@pytest.mark.parametrize("name", ["int8", "int16", "float32"])
def test_one_command(folder, name, capsys, monkeypatch):
    monkeypatch.delenv("BITMILL_ACTIVATIONS", raising=False)
    words = ["eval", str(folder / "out"), "--text", str(folder / "text.txt"), "--windows", "2", "--seqlen", "32"]
    capsys.readouterr()
    assert main([*words, "--activations", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["activations"].startswith(name)
    assert "BITMILL_ACTIVATIONS" not in os.environ


def test_recipe_is_the_default(folder, capsys, monkeypatch):
    monkeypatch.delenv("BITMILL_ACTIVATIONS", raising=False)
    words = ["eval", str(folder / "out"), "--text", str(folder / "text.txt"), "--windows", "2", "--seqlen", "32"]
    found = []
    for more in ([], ["--activations", "recipe"]):
        capsys.readouterr()
        assert main([*words, *more, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["activations"] == found[1]["activations"]
    assert found[0]["perplexity"] == found[1]["perplexity"]


def test_another_type_is_refused(folder, capsys):
    assert main(["generate", str(folder / "out"), "--prompt", "w1", "--activations", "int3"]) == 2
    assert "int3" in capsys.readouterr().err
