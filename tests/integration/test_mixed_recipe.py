"""A recipe of three rules, one of them float: quantize, resume, load, decode, compare, verify."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.writer import FolderSink
from bitmill.cli.main import main
from bitmill.formats.codebook import Codebook
from bitmill.formats.uniform import Uniform
from bitmill.native import is_available
from bitmill.runtime.decode import decode_path
from helpers.comparisons import command
from helpers.workspace import arguments, save_model, snapshot, write_text

RULES = [
    "model.layers.0.self_attn.o_proj=float",
    "*.down_proj=uniform:bits=8,group_size=16",
    "model.layers.1.mlp.*=codebook:bits=4",
]


def quantize_command(*more: str) -> list[str]:
    """In the current folder: paths are part of the record."""
    rules = [word for rule in RULES for word in ("--rule", rule)]
    return arguments(Path("source"), "text.txt", Path("out"), *rules, *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Inputs and a quantized folder."""
    folder = tmp_path_factory.mktemp("mixed")
    save_model(folder / "source", blocks=3)
    write_text(folder / "text.txt")
    with contextlib.chdir(folder):
        assert main(quantize_command()) == 0
    return folder


def test_each_layer_has_the_format_of_its_rule(place):
    formats = open_checkpoint(place / "out").formats
    assert "model.layers.0.self_attn.o_proj" not in formats
    assert formats["model.layers.1.mlp.down_proj"] == Uniform(8, 16)
    assert isinstance(formats["model.layers.1.mlp.up_proj"], Codebook)
    assert formats["model.layers.2.mlp.up_proj"].bits == 4


def test_recipe_file_repeats_the_folder(place, tmp_path):
    again = arguments(Path("source"), "text.txt", tmp_path / "out", method="")
    again = [word for word in again if word not in ("--group-size", "16")]
    with contextlib.chdir(place):
        assert main([*again, "--method", "out/recipe.yaml"]) == 0
    expected, found = snapshot(place / "out"), snapshot(tmp_path / "out")
    assert {name for name in found if found[name] != expected[name]} == set()


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_resume_after_kill(place, tmp_path, blocks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("source", "text.txt"):
        os.symlink(place / name, tmp_path / name)
    child = os.fork()
    if child == 0:  # killed once so many blocks are written
        write = FolderSink.write

        def killed(self, result, streamed):
            if result.index == blocks:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, result, streamed)

        FolderSink.write = killed
        os._exit(main(quantize_command()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(json.loads((tmp_path / "out.partial" / "journal.json").read_text())["blocks"]) == blocks
    assert main(quantize_command("--resume")) == 0
    assert snapshot(tmp_path / "out") == snapshot(place / "out")


def test_loads_and_decodes_in_the_compiled_step(place, monkeypatch):
    for name in ("BITMILL_KERNEL", "BITMILL_ACTIVATIONS", "BITMILL_DECODE"):
        monkeypatch.delenv(name, raising=False)
    model = bitmill.load(place / "out")
    unpacked = bitmill.load(place / "out", dense=True)
    tokens = torch.tensor([[5, 17, 99, 3, 42]])
    with torch.no_grad():
        assert torch.allclose(
            model(tokens).logits, unpacked(tokens).logits, atol=5e-2
        )  # inputs are rounded to 8 bits
    made = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 9)
    if is_available():
        assert decode_path(model) == "step"


def test_verify(place, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["verify", "out"]) == 0


def test_compare(workspace, quick, place, capsys):
    recipe = place / "out" / "recipe.yaml"
    assert main(command(workspace, "--recipes", recipe, methods="rtn", bits="4")) == 0
    assert "rules" in capsys.readouterr().out


def test_summary_lists_the_formats(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    dry = [word for word in quantize_command("--dry-run", "--json") if word not in ("-o", "out")]
    assert main(dry) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [entry["layers"] for entry in summary["formats"]] == [15, 3, 2]
