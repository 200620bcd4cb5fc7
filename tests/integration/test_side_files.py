"""Files beside the weights are tried before the first block; none is lost or takes the place of one of ours."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.cli.main import main
from bitmill.errors import SourceError
from helpers.workspace import interrupted_after, snapshot

OWN = (
    "report.json",
    "Report.html",
    "recipe.yaml",
    "README.md",
    "readme.MD",
    "SOURCE_README.md",
    "KV.safetensors.txt",
)


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_names_of_ours_and_names_that_are_no_text(workspace):
    texts = {name: f"{name} of the source" for name in OWN}
    for name, text in texts.items():
        (workspace.source / name).write_text(text)
    strange = os.fsdecode(b"notes\xff.txt")
    (workspace.source / strange).write_text("words")
    run(*workspace.quantize(method="rtn"))
    checkpoint = open_checkpoint(workspace.out)
    kept = [path.read_text() for path in workspace.out.iterdir() if b" of the source" in path.read_bytes()]
    assert set(kept) == set(texts.values())
    names = [path.name.casefold() for path in workspace.out.iterdir()]
    assert len(set(names)) == len(names)
    assert (workspace.out / strange).read_text() == "words"
    assert strange in checkpoint.report["files"]
    run("verify", workspace.out, "--no-quality")
    run("inspect", workspace.out)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda source: (source / "generation_config.json").write_text("[1]"), "generation_config.json"),
        (lambda source: (source / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
def test_unusable_file_is_found_first(spoil, words, workspace, monkeypatch, capsys):
    interrupted_after(-1, monkeypatch)  # before the first block, which is not reached
    spoil(workspace.source)
    assert main(workspace.quantize(method="gptq")) == 1
    assert words in capsys.readouterr().err
    assert not workspace.out.with_name("out.partial").exists()


def test_windows_too_short_for_keys_and_values_are_found_first(workspace, monkeypatch, capsys):
    interrupted_after(-1, monkeypatch)
    assert main(workspace.quantize("--kv", "kvquant", "--kv-seqlen", "32", method="rtn")) == 1
    assert "too few to calibrate" in capsys.readouterr().err
    assert not workspace.out.with_name("out.partial").exists()


@pytest.mark.parametrize("what", ["generation config", "config"])
def test_live_model_that_cannot_be_saved(what, workspace):
    model = AutoModelForCausalLM.from_pretrained(workspace.source)
    if what == "config":
        model.config.odd = object()
    else:
        model.generation_config.do_sample, model.generation_config.temperature = False, 0.3
    with pytest.raises(SourceError, match=f"{what} .*cannot be saved"):
        bitmill.quantize(model, "rtn", out=workspace.out, measure=0)
    assert not workspace.out.with_name("out.partial").exists()
    assert torch.isfinite(next(model.parameters())).all()


def test_resumed_inside_the_source(workspace, monkeypatch):
    """A resumed run has the side files of now, and none from the folder that it makes inside of the source."""
    (workspace.source / "notes.txt").write_text("words")
    inside = workspace.source / "sub"
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        assert main(workspace.quantize(method="rtn", out=inside)) == 130
    (workspace.source / "notes.txt").unlink()
    shutil.copy(workspace.text, workspace.source / "other.txt")
    run(*workspace.quantize("--resume", method="rtn", out=inside))
    names = {name for name in snapshot(inside) if "/" in name or name in ("notes.txt", "other.txt")}
    assert names == {"other.txt"}


def test_copy_inside_the_folder_refused(workspace, capsys):
    words = [
        "quantize",
        str(workspace.done),
        "--method",
        "none",
        "--kv",
        "per_token",
        "-o",
        str(workspace.done / "a"),
    ]
    assert main(words) == 2
    assert "lies in" in capsys.readouterr().err


def test_hint_only_where_a_run_can_be_resumed(workspace, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitmill.workflows.kv.calibrate_on", interrupt)
    words = ["--kv", "kvquant", "--kv-samples", "2", "--kv-seqlen", "40", "--calib", workspace.text.name]
    assert main(["quantize", str(workspace.done), "--method", "none", *words]) == 130
    assert capsys.readouterr().err == "interrupted\n"
