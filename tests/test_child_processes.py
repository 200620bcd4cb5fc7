"""Child processes import nothing from the directory in which the user stands."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from bitmill.sources import wheels
from bitmill.workflows.comparison import process

ROOT = Path(__file__).parent.parent
SOURCES = [file for folder in ("src", "benchmarks", "examples") for file in sorted((ROOT / folder).rglob("*.py"))]


def pip_command(monkeypatch, tmp_path) -> list[str]:
    seen: list[str] = []

    def record(command, **_):
        seen.extend(command)
        raise OSError

    monkeypatch.setattr(wheels.subprocess, "run", record)
    with pytest.raises(OSError):
        wheels.download_wheel("name==1.0", "0" * 64, tmp_path)
    return seen


@pytest.mark.parametrize("start", [lambda *_: list(process.WORKER), pip_command], ids=["compare", "zoo"])
def test_hostile_folder(start, monkeypatch, tmp_path):
    """The module that is run is replaced by a small one, since only the search path matters here."""
    command = start(monkeypatch, tmp_path)
    monkeypatch.undo()
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "argparse", "yaml", "bitmill", "pip"):
        (here / f"{name}.py").write_text("raise SystemExit('code of the current folder')\n")
    harmless = [*command[: command.index("-m") + 1], "json.tool", "--help"]
    done = subprocess.run(harmless, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _words(node: ast.AST) -> list[str]:
    return [part.value if isinstance(part, ast.Constant) else ast.unparse(part) for part in node.elts]


def test_every_child_is_safe():
    """A command of a Python runs a script by its path, or a module with -P."""
    unsafe = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.List, ast.Tuple)):
                words = _words(node)
                if "-m" in words and words[words.index("-m") - 1] != "-P":
                    unsafe.append(f"{file.name}:{node.lineno}")
                unsafe += [f"{file.name}:{node.lineno}"] * ("-c" in words and "sys.executable" in words)
    assert not unsafe
