"""vLLM itself on a folder: its greedy tokens are ours. It is skipped where vLLM is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bitmill
from helpers.workspace import save_model

PROGRAM = """
import json, sys, vllm
if __name__ == "__main__":
    model = vllm.LLM(sys.argv[1], dtype="float32", max_model_len=48, max_num_seqs=1, enforce_eager=True)
    wanted = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (answer,) = model.generate([{"prompt_token_ids": [1, 5, 9]}], wanted, use_tqdm=False)
    print("tokens", json.dumps(list(answer.outputs[0].token_ids)))
"""
OPTIONS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "BITMILL_ACTIVATIONS": "float32"}


def wide_model(folder: Path) -> Path:
    """Save a model whose heads have 64 channels: vLLM's attention on CPUs has no kernel for narrow ones."""
    save_model(folder)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("method", ["gptqt", "squeezellm", "rtn"])
def test_greedy_tokens(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    text = "w1 w5 w9 w20 w7 w3 " * 200
    bitmill.quantize(
        str(wide_model(tmp_path / "float")),
        method,
        bits=4,
        out=tmp_path / "packed",
        measure=0,
        calib=bitmill.CalibrationData([text], samples=2, seqlen=32),
    )
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "packed")],
        env={**os.environ, **OPTIONS},
        capture_output=True,
        text=True,
    )
    model = bitmill.load(tmp_path / "packed")
    ids = torch.tensor([[1, 5, 9]])
    expected = model.generate(
        ids, attention_mask=ids > 0, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert f"tokens {expected[0, 3:].tolist()}" in done.stdout, done.stderr[-2000:]
