"""The benchmark commands on tiny layers."""

from __future__ import annotations

import json

import pytest
import torch

import bitmill
from bitmill.cli.main import main
from bitmill.errors import UsageError
from bitmill.formats import FORMATS
from bitmill.formats.quantized import unpack
from bitmill.runtime.modules.dequantize import dequantized_bytes
from bitmill.workflows.bench import formats, memory, models
from bitmill.workflows.bench.formats import bench_formats
from bitmill.workflows.bench.kernels import CASES, bench_kernels, random_packed
from bitmill.workflows.load import load
from helpers.tiny_models import tiny_model

KEYS = {"kernel", "format", "bits", "group_size", "shape", "tokens", "bits_per_weight", "time_s", "GBps"}
KEYS |= {"fraction_of_read_bandwidth", "speedup_vs_torch_fp32"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for module in ("bitmill.workflows.bench.memory",):
        monkeypatch.setattr(f"{module}.cold_bytes", lambda: 1 << 20)


def test_all_cases_measured():
    result = bench_kernels(((32, 160),), turns=1)
    assert len(result["kernels"]) == len(CASES)
    assert all(case.keys() == KEYS for case in result["kernels"])
    assert all(case["GBps"] > 0 and case["speedup_vs_torch_fp32"] > 0 for case in result["kernels"])
    assert result["read_bandwidth_GBps"] > 0


def test_a_prompt_beyond_the_context(tmp_path):
    bitmill.quantize(tiny_model("llama"), "rtn", out=tmp_path / "q", measure=0)
    for measure in (models.bench_prefill, models.bench_decode):
        with pytest.raises(UsageError, match=r"reads at most 64 tokens, and this needs \d+; lower --tokens"):
            measure(tmp_path / "q", tokens=65)


@pytest.mark.parametrize(("name", "bits", "size"), CASES)
def test_random_layers(name, bits, size):
    format = FORMATS.get(name)(bits=bits, group_size=size)
    assert torch.isfinite(unpack(format, random_packed(format, (5, 200)), (5, 200)).dequantize()).all()


def test_json_output(capsys):
    arguments = [
        "bench",
        "kernels",
        "--shape",
        "32x160",
        "--format",
        "uniform",
        "--bits",
        "3",
        "--turns",
        "1",
        "--json",
    ]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert [case["bits"] for case in result["kernels"]] == [3]
    assert main(arguments[:-1]) == 0
    assert "uniform" in capsys.readouterr().out


def test_errors_of_formats(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bitmill.workflows.bench.formats.SHAPE", (8, 512))
    result = bench_formats()
    assert len(result["formats"]) == len(formats.CASES)
    assert all(case["excess_dB"] > 0 for case in result["formats"])
    lattice = next(case for case in result["formats"] if case["format"] == "e8")
    assert 1.3 < lattice["excess_dB"] < 1.9  # 0.091 of the variance against 1/16
    tiny_model("llama").save_pretrained(tmp_path / "m")
    assert main(["bench", "formats", "--model", str(tmp_path / "m"), "--format", "e8", "--bits", "2"]) == 0
    assert "dB above bound" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--bits is 9; use some of 2"):
        bench_formats(formats=("e8",), bits=(9,))


def test_models(tmp_path, capsys):
    bitmill.quantize(tiny_model("llama"), "rtn", bits=4, out=tmp_path / "out", measure=0)
    for command, more in (("decode", []), ("prefill", ["--turns", "2"])):
        arguments = ["bench", command, str(tmp_path / "out"), "--tokens", "7", *more]
        assert main([*arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["tokens"] == 7
        assert result["ratio"] == pytest.approx(result["tokens_per_s"] / result["float_tokens_per_s"])
        assert result["peak_memory_bytes"] > 0
        assert main(arguments) == 0
        assert "tokens/s" in capsys.readouterr().out
    assert result["first_call_s"] > 0
    assert result["time_to_first_token_s"] == pytest.approx(7 / result["tokens_per_s"])


@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_float_weights_without_memory(command, tmp_path, capsys, monkeypatch):
    model = tiny_model("llama")
    count = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    bitmill.quantize(model, "rtn", bits=4, out=tmp_path / "out", measure=0)
    assert dequantized_bytes(load(tmp_path / "out")) == 4 * count
    monkeypatch.setattr(models, "dequantized_bytes", lambda live: 1 << 60)
    arguments = ["bench", command, str(tmp_path / "out"), "--tokens", "4"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens_per_s"] > 0
    assert result["float_tokens_per_s"] is None
    assert result["ratio"] is None
    assert main(arguments) == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["kernels", "--shape", "4096"], "--shape is '4096'"),
        (["kernels", "--format", "nonsense"], "--format is 'nonsense'"),
        (["kernels", "--turns", "0"], "--turns is 0"),
        (["kernels", "--tokens", str(10**20)], "needs more memory"),
        (["kernels", "--bits", "9"], "--bits is 9"),
        (["prefill", "nowhere", "--turns", "1001"], "--turns is 1001"),
        (["decode", "nowhere"], "nowhere is no quantized folder"),
        (["prefill", "nowhere"], "nowhere is no quantized folder"),
        (["prefill", "nowhere", "--turns", "0"], "turns is 0"),
        (["prefill", "nowhere", "--tokens", "0"], "tokens is 0"),
    ],
)
def test_invalid_input_refused(arguments, sentence, capsys):
    assert main(["bench", *arguments]) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_copies_exceed_cpu_caches():
    assert memory.copies_of(1 << 18) == 4
    assert memory.copies_of(1 << 30) == 2
    assert memory.cache_bytes() > 0
