"""The demo's path on the real SmolLM2-135M with few tokens, through the command line and transformers."""

import hashlib
import json

import pytest
import torch

import bitmill
from bitmill.cli.main import main
from bitmill.data.text import load_text
from helpers.selection import FULL

pytestmark = [pytest.mark.real, pytest.mark.skipif(not FULL, reason="runs in make test-all")]

MODEL = "smollm2-135m"
TEXT_SHA256 = "71f2ff5d99bd"  # of pydoc in Python 3.11.7; other releases say some things in other words


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SmolLM2 in 3 bits by gptqt, without its slower passes."""
    out = tmp_path_factory.mktemp("real") / "smollm2-3bit"
    options = ["--calib", "mix", "--set", "group_passes=0", "--set", "column_passes=0"]
    options += ["--samples", "8", "--seqlen", "256"]  # of six domains
    assert main(["quantize", MODEL, "--method", "gptqt", "--bits", "3", *options, "-o", str(out), "--json"]) == 0
    return out


def command(capsys, *args):
    capsys.readouterr()
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_published_float_perplexity(capsys):
    """The whole protocol: 40 windows of 512 tokens of the last 20 % of pydoc."""
    if not hashlib.sha256(load_text("pydoc").encode()).hexdigest().startswith(TEXT_SHA256):
        pytest.skip("the pydoc of this Python is another text than the one of the published figures")
    result = command(capsys, "eval", MODEL, "--text", "pydoc", "--seqlen", "512", "--windows", "40")
    assert result["perplexity"] == pytest.approx(11.231, abs=0.01)
    assert result["tokens"] == 40 * 512


def test_three_bits_stored_size(folder, capsys):
    result = command(capsys, "inspect", str(folder))
    assert 3.0 < result["bits_per_weight"] < 3.3
    packed = [t for t in result["tensors"] if t["format"] == "integer_coding"]
    assert len(packed) == 210
    assert sum(f.stat().st_size for f in folder.iterdir()) < 115e6


def test_quality_is_close(folder, capsys):
    measured = json.loads((folder / "report.json").read_text())["measured"][0]
    assert measured["perplexity"] < 1.5 * measured["reference_perplexity"]
    evaluated = command(capsys, "eval", str(folder), "--windows", "2", "--reference", MODEL)
    assert evaluated["perplexity"] < 1.5 * evaluated["reference_perplexity"]
    assert 0 < evaluated["kl_divergence"] < 0.6
    assert evaluated["top1_agreement"] > 0.6


def test_transformers_loads_packed(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert held < 1.1 * stored
    tokens = torch.arange(100, 132)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        ours = bitmill.load(folder)(tokens).logits
    assert torch.equal(theirs, ours)


def test_generates_answer(folder, capsys):
    prompt = "What is the capital of France? Answer in one sentence."
    result = command(capsys, "generate", str(folder), "--prompt", prompt, "--max-new-tokens", "24", "--dense")
    assert "Paris" in result["text"]


def test_folder_verifies(folder, capsys):
    assert command(capsys, "verify", str(folder), "--no-quality")
