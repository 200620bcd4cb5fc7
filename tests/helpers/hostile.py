"""Hostile values for the parameters of any command or function, by their kinds."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from bitmill.cli.main import app
from bitmill.formats import FORMATS
from bitmill.kv import KV_METHODS
from bitmill.recipes.method import METHODS
from bitmill.solvers import SOLVERS
from bitmill.transforms import TRANSFORMS
from bitmill.tuners import TUNERS

TEXTS = [
    "",
    " ",
    "-1",
    "nan",
    "x" * 300,
    "a[bold]b[/x]",
    "w1 \udcff w2",
    "\x00",
    "\x1b[31m",
    "é🐢\u202e",
    "--- \n key: v",
    "{{7*7}}",
    "[" * 3000,
    "&a [*a]",
    "~nobody/x",
    "hf:",
    "hf:a:b:c:d",
    "²",
    "=",
    "a=b",
    "bits=0x" + "f" * 5000,
    "uniform:bits=nan",
    "a.b=c",
]
PATHS = ["source", "done", "text.txt", "pipe", "deep", "no/ne", "folder", "mine.yaml", "long.yaml", "binary", "."]
CHEAP = {  # given first where a command has the option, so that a call that succeeds is quick
    "--samples": ("--samples=2",),
    "--seqlen": ("--seqlen=16",),
    "--windows": ("--windows=1",),
    "--calib": ("--calib=text.txt",),
    "--turns": ("--turns=1",),
    "--shape": ("--shape=16x32",),
    "--max-new-tokens": ("--max-new-tokens=2",),
}
INTEGERS = [0, 1, -1, 2, 3, 16, 64, 10**6, 2**31, 2**63, 10**20, -(10**20)]
FLOATS = ["nan", "inf", "-inf", "0", "-1", "1e-320", "1e308", "0.5", "1e999", "x", ""]


def write_files(folder: Path) -> None:
    """Write the files that PATHS names, beside those of a workspace."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "deep").mkdir()
    for name in ("config.json", "report.json", "recipe.yaml", "results.json"):
        (folder / "deep" / name).write_text("[" * 50_000)
    (folder / "mine.yaml").write_bytes((folder / "done" / "recipe.yaml").read_bytes())
    (folder / "long.yaml").write_text("name: x\nweight: {format: uniform, bits: 0x" + "f" * 5000 + "}\n")


@dataclass(frozen=True)
class Command:
    """A command of the command line: its words, and (flag or None, type) of every parameter."""

    words: tuple[str, ...]
    parameters: tuple[tuple[str | None, Any], ...]


def commands() -> list[Command]:
    """Return every command of the command line, by introspection."""
    found = [_command((info.name,), info.callback) for info in app.registered_commands]
    for group in app.registered_groups:
        members = group.typer_instance.registered_commands
        found += [_command((group.name, info.name), info.callback) for info in members]
    return found


def _command(words: tuple[str, ...], callback: Any) -> Command:
    parameters: list[tuple[str | None, Any]] = []
    for name, hint in typing.get_type_hints(callback, include_extras=True).items():
        if name == "return":
            continue
        kind, about = typing.get_args(hint)[:2]
        declared = (about.default, *(about.param_decls or ()))
        flags = [flag for flag in declared if isinstance(flag, str) and flag.startswith("-")]
        is_option = "Option" in type(about).__name__
        flag = (flags[-1].partition("/")[0] if flags else "--" + name.replace("_", "-")) if is_option else None
        parameters.append((flag, kind))
    return Command(words, tuple(parameters))


def values_of(kind: Any) -> st.SearchStrategy[str]:
    """Return texts for a parameter of a command: of its own type, and of others."""
    words = st.sampled_from([*PATHS, *TEXTS])
    members = {kind, *typing.get_args(kind)}
    members |= {part for member in members for part in typing.get_args(member)}
    if int in members:
        return st.one_of(st.sampled_from([str(value) for value in INTEGERS]), words)
    if float in members:
        return st.one_of(st.sampled_from(FLOATS), words)
    if choices := [member for member in members if isinstance(member, str)]:
        return st.one_of(st.sampled_from(sorted(choices)), words)
    return words


@cache
def sound_values() -> dict[str, st.SearchStrategy[str]]:
    """Return values that a command can do something with, by option; others have hostile ones alone."""
    methods = {name: tuple(kind.__dataclass_fields__) for name, kind in METHODS.items()}
    names = {
        "--method": [*methods, "none", "mine.yaml"],
        "--methods": ["rtn", "rtn,gptq", "all"],
        "--format": [*FORMATS.names(), "uniform:bits=3", "codebook:bits=2,group_size=row"],
        "--solver": SOLVERS.names(),
        "--transform": TRANSFORMS.names(),
        "--tuner": TUNERS.names(),
        "--kv": [*KV_METHODS.names(), "kvquant:bits=2"],
        "--rule": ["*.o_proj=float", "*.down_proj=uniform:bits=8", "*=float", "*.v_proj=codebook:bits=9"],
        "--bits": ["2", "3", "4", "8", "3,4"],
        "--type": ["Q4_K", "Q2_K", "IQ4_XS"],
        "--head-bits": ["8", "4"],
        "--sparse": ["0.01", "0.5"],
        "--out": ["out", "none/out", "folder"],
        "--reference": ["source", "done"],
        "--text": ["text.txt"],
        "--calib": ["text.txt", "self"],
        "--prompt": ["w1 w2", "w1 " * 100],
        "--context": ["16", "1k"],
        "--memory": ["1GB"],
        "--shape": ["1x1", "5x3", "0x8", "8x-8", "99999999x99999999", "9" * 400 + "x1", "9" * 5000 + "x1"],
    }
    options = sorted({option for known in methods.values() for option in known})
    values = st.sampled_from([*FLOATS, "1", "3", "16", "row", "true", "false", "[1]", "a"])
    pairs = st.builds("{}={}".format, st.sampled_from(options), values)
    kv = st.builds("{}={}".format, st.sampled_from(["bits", "group", "residual", "outliers", "fisher"]), values)
    settings = {"--set": st.one_of(pairs, pairs.map("gptq.{}".format)), "--kv-set": kv}
    return {**{flag: st.sampled_from(words) for flag, words in names.items()}, **settings}


@st.composite
def calls(draw: Any, command: Command) -> list[str]:
    """Draw the words of a call: every argument, and up to four options."""
    models = st.one_of(st.sampled_from(["source", "done"]), st.sampled_from([*PATHS, *TEXTS]))
    words = list(command.words)
    options = [(flag, kind) for flag, kind in command.parameters if flag]
    words += [word for flag, _ in options for word in CHEAP.get(flag, ())]
    drawn = st.lists(st.sampled_from(options), max_size=4, unique_by=lambda option: option[0])
    chosen = draw(drawn) if options else []
    for flag, kind in chosen:
        values = st.one_of(sound_values().get(flag, values_of(kind)), values_of(kind))
        words.append(flag if kind is bool else f"{flag}={draw(values)}")
    return [*words, *(draw(models) for flag, _ in command.parameters if not flag)]


class Strange:
    """An object of no use, whose repr has markup."""

    def __repr__(self) -> str:
        return "<b>[red]strange[/red]</b>"


VALUES = [
    *(None, True, 0, -1, 1, 3, 16, 10**6, 2**63, 10**20, -(10**5000), 0.5, -0.0, float("nan"), float("inf")),
    *("", "x", "source", "nan", "\x00", "a\udcffb", "x" * 5000, b"x", Path("pipe"), Path("source"), Path("no/ne")),
    *([], [None], ["x"], ["w1 w2"], (), {}, {"bits": 3}, {1: 2}, {"x"}, iter([1]), range(3), 1j),
    *(Strange(), Strange, print, torch.nn.Linear(2, 2)),
    *(torch.zeros(0), torch.zeros(2, 2), torch.full((2, 8), 3), torch.full((2, 8), 10**6)),
]
