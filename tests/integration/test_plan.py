"""bitmill plan, run through the command line."""

from __future__ import annotations

import json

import pytest

from bitmill.cli.main import main
from bitmill.cli.plan import total_rows
from bitmill.workflows.plan.plan import plan

BARE = "kvquant:outliers=0,key_outliers=0,residual=0"
PAPER = "kvquant:channel_levels=false,equalize=false,outliers=0.01,key_outliers=0.01,residual=0"


@pytest.fixture
def text(capsys):
    def text(*arguments: object, fits: bool = True) -> str:
        assert main(["plan", *map(str, arguments)]) == (not fits)
        out, err = capsys.readouterr()
        assert ("which does not fit" in err) == (not fits)
        return " ".join(out.split())

    return text


def test_llama_7b(text):
    out = text("llama-7b", "--context", "1M", "--memory", "80GB", "--kv", PAPER, "--kv-bits", 2, fits=False)
    assert "32 layers of 32 heads of 128 numbers" in out
    assert "1,048,576 tokens the model was trained for 2,048" in out
    assert "float16 16 16.000 549.76 512.00" in out
    assert "keys and values 79.88 GB (74.39 GiB), kvquant:outliers=0.01,key_outliers=0.01," in out
    assert "does not fit, 13.41 GB (12.49 GiB) too much in 80.00 GB (74.51 GiB) of memory" in out
    assert "quality not measured computed everything but quality" in out


def test_eight_devices(text):
    terms = ["--context", "10_000_000", "--memory", "80GiB", "--gpus", 8]
    out = text("llama-7b", *terms, "--kv", BARE, "--kv-bits", 2, "--batch", 1)
    assert "656.67 GB (611.57 GiB), kvquant:outliers=0" in out
    assert "fits, 2.08 GB (1.94 GiB) to spare in 85.90 GB (80.00 GiB) of memory on each of 8 devices" in out


def test_packed_folder_quality(workspace, text, capsys):
    out = text(workspace.done, "--method", "gptq", "--bits", 2, "--set", "group_size=16", "--batch", 2)
    (measured,) = json.loads((workspace.done / "report.json").read_text())["measured"]
    assert f"perplexity {measured['perplexity']:.5g}" in out
    assert "weights as stored, keys and values in float" in out
    assert "gptq, 2 bits" in out
    assert "64 tokens x 2 rows" in out
    assert "trained for" not in out


def test_sliding_windows(tmp_path, text):
    from helpers.tiny_models import tiny_config

    tiny_config("gemma2", sliding_window=16).save_pretrained(tmp_path / "w")
    assert "1 of them keep the last 16 tokens" in text(tmp_path / "w")


def test_measured_cache():
    result = plan("llama-7b")
    result["measured"] = [{"perplexity": 5.7, "kv_bits_per_element": 2.33, "windows": 1, "seqlen": 8}]
    (quality,) = (value for name, value in total_rows(result) if name == "quality")
    assert quality.endswith("weights as stored, keys and values at 2.33 bits")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [(["--memory", "80"], "80GiB"), (["--context", "0"], "128k"), (["--kv-bits", "2"], "give --kv")],
)
def test_invalid_input_refused(arguments, fragment, capsys):
    assert main(["plan", "llama-7b", *arguments]) == 2
    err = capsys.readouterr().err
    assert fragment in err
    assert err.count("\n") == 1
