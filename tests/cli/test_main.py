"""Renamed commands and options still work, with a deprecation note."""

from __future__ import annotations

import pytest

from bitmill.cli.main import main, replace_old_names


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["study", "M", "--text", "pydoc"], ["sweep", "M", "--text", "pydoc"]),
        (["quantize", "M", "--within", "5"], ["quantize", "M", "--max-minutes", "5"]),
        (["quantize", "M", "--within=5"], ["quantize", "M", "--max-minutes=5"]),
    ],
)
def test_old_names(old, new, capsys):
    assert replace_old_names(old) == new
    assert "is deprecated" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"], ["eval", "M", "--within"], ["sweep", "study"]])
def test_new_names(words, capsys):
    assert replace_old_names(words) == words
    assert capsys.readouterr().err == ""


def test_old_command_runs(capsys):
    assert main(["study", "--help"]) == 0
    assert "Usage: bitmill sweep" in capsys.readouterr().out
