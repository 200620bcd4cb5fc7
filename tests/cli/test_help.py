"""--help shows commands and options in groups, and ends with examples that are valid."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main

from bitmill.cli.help import COMMANDS, EXAMPLES
from bitmill.cli.main import app, main
from bitmill.recipes.method import METHODS


def commands():
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        for sub, inner in getattr(command, "commands", {"": command}).items():
            yield f"{name} {sub}".strip(), inner


FOUND = dict(commands())


def test_groups_of_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"─ {panel} ─") for panel in COMMANDS]
    assert places == sorted(places)
    assert {name.partition(" ")[0] for name in FOUND} == {name for names in COMMANDS.values() for name in names}


@pytest.mark.parametrize("name", FOUND)
def test_examples(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    for line in EXAMPLES[name]:
        assert line in out
        words = shlex.split(line.partition(" -- ")[0])  # behind it are another program's
        assert " ".join(words[1 : 1 + len(name.split())]) == name
        known = {option for one in FOUND[name].params for option in (*one.opts, *one.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known
        if "--method" in words:
            assert words[words.index("--method") + 1] in METHODS.names()


def test_groups_of_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["quantize", "--help"]) == 0
    panels = re.split(r"╭─ ([\w ]+) ─", capsys.readouterr().out)
    found = dict(zip(panels[1::2], panels[2::2]))
    assert "--group-size" in found["Method"]
    assert "--calib" in found["Text and measurement"]
    assert "--kv-bits" in found["Keys and values"]
    assert "--quiet" in found["Output"]
    others = set(re.findall(r"--[\w-]+", found.get("Options", "")))
    assert others <= {"--help"}, "add them to PANELS of cli/help.py"
