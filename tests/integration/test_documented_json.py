"""docs/cli.md lists the keys of every JSON object that a command prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bitmill.cli.main import main
from helpers import sample_results

CLI = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


CACHED = {"kv_method", "kv_options", "kv_bits_per_element", "kv_bytes", "kv_table_bytes"}  # with --kv


def documented(command: str) -> set[str]:
    section = CLI[CLI.index(f"\n## bitmill {command}\n") + 1 :].partition("\n## ")[0]
    return set(re.findall(r"`(\w+)`", section.partition("JSON keys:")[2]))


@pytest.fixture
def keys(capsys):
    """Run a command that must succeed; the keys it printed, those of listed objects included."""

    def run(*arguments: object) -> set[str]:
        assert main([*map(str, arguments), "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        nested = (
            "tensors",
            "options",
            "methods",
            "demo_models",
            "architectures",
            "cells",
            "layers",
            "kinds",
            "texts",
        )
        nested = (*nested, "formats", "weights", "cache", "longest")
        return set(data) | {key for name in nested if isinstance(data.get(name), list) for key in data[name][0]}

    return run


def test_quantize(workspace, keys):
    assert keys(*workspace.quantize()) | {"dry_run", "chosen", "budget"} == documented("quantize")
    dry = documented("quantize") - {"chosen", "budget", "measured", "time_s", "peak_memory_bytes"}
    assert keys(*workspace.quantize("--dry-run", out=workspace.root / "dry")) == dry


def test_train(workspace, keys):
    options = ["--teacher", workspace.source, "--calib", workspace.text, "--samples", 8, "--seqlen", 32]
    options += ["--held-apart", 2, "--tokens", 32, "--max-minutes", 5, "-o", workspace.root / "trained"]
    nested = {"samples", "seed", "seqlen", "sha256", "source", "trained_on", "step", "epoch", "training_loss"}
    nested |= {"perplexity", "kl_divergence", "top1_agreement"}  # of `windows`, `curve`, `before` and `after`
    assert keys("train", workspace.done, *options) == documented("train") - nested - {"stopped"}


def test_eval(workspace, keys):
    command = ["eval", workspace.done, "--text", workspace.text, "--seqlen", 32, "--windows", 1]
    compared = {"kl_divergence", "kl_interval", "kl_p99", "kl_p999", "top1_agreement"}
    compared |= {"reference_perplexity", "perplexity_ratio"}
    of_texts = {"part", "separator", "windows_per_domain", "domains"}
    answers = {"samples", "prompt", "chat", "max_new_tokens", "answer", "reference_answer"}
    assert answers <= documented("eval")
    all_keys = documented("eval") - of_texts - answers
    assert keys(*command) == all_keys - compared - CACHED - {"kv_calibration", "kv_on_calibration_text"}
    packed = keys(*command, "--reference", workspace.source, "--kv", "per_token")
    assert packed == all_keys


def test_compare(workspace, keys, monkeypatch):
    from bitmill.workflows.comparison.run import run_grid

    row = sample_results.document()["float"]
    monkeypatch.setattr(run_grid, "__kwdefaults__", {**run_grid.__kwdefaults__, "run": lambda *_: row})
    terms = ["--calib", workspace.text, "--samples", 4, "--seqlen", 32, "--windows", 1, "--max-new-tokens", 1]
    monkeypatch.setattr("bitmill.workflows.comparison.grid._check_bits", lambda *_: None)
    nothing = ["--methods", "rtn", "--bits", 9]  # cannot be had
    assert keys("compare", workspace.source, *nothing, *terms, "-o", workspace.out) == documented("compare")


def test_sweep(workspace, keys):
    command = ["sweep", workspace.source, "--text", workspace.text, "--seqlen", 16, "--windows", 1]
    inside = {"text", "split", "seqlen", "windows", "reference_perplexity"}
    assert keys(*command) == documented("sweep") - inside - {"safe", "fair", "poor", "broken"}


def test_plan(workspace, keys):
    command = ["plan", workspace.done, "--memory", "1GB", "--kv", "kvquant", "--kv-bits", 2]
    inside = {"chunk", "decode_bytes", "prompt_at_once_bytes", "float_layer_bytes"}
    assert keys(*command) == documented("plan") - inside


def test_generate(workspace, keys):
    command = ["generate", workspace.done, "--prompt", "w1", "--max-new-tokens", 1]
    assert keys(*command, "--kv", "per_token") == documented("generate") - {"eos", "length"}
    assert keys(*command) == documented("generate") - {"eos", "length"} - CACHED


def test_inspect_and_verify(workspace, keys):
    assert keys("inspect", workspace.done) == documented("inspect") - {"float16"}
    assert keys("verify", workspace.done, "--no-quality") == documented("verify")


def test_catalog(keys):
    assert keys("methods") | keys("methods", "rtn") == documented("methods")
    assert keys("models") == documented("models") - {"requirement", "member", "path"}  # of wheels; with a name


def test_texts(keys):
    assert keys("texts") | keys("texts", "documentation") == documented("texts")
