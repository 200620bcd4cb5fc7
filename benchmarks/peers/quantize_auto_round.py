"""Quantize a folder with auto-round, in its own environment: see quantize.py."""

from __future__ import annotations

import importlib.metadata

import torch
from auto_round import AutoRound
from peer_arguments import report, request
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    asked = request()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16)
    tokens = torch.from_numpy(asked.windows())
    windows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    symmetric = asked.bits > 2  # its two bits are useful with a zero point only
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(asked.model),
        bits=asked.bits,
        group_size=asked.group,
        sym=symmetric,
        iters=asked.iters,
        dataset=torch.utils.data.DataLoader(windows, batch_size=8),
        nsamples=len(windows),
        seqlen=tokens.shape[1],
        device_map="cpu",
    )
    rounding.quantize_and_save(str(asked.out), format="auto_gptq")
    kind = "symmetric" if symmetric else "asymmetric"
    report(asked, importlib.metadata.version("auto-round"), f"{kind}, {asked.iters} iterations, batch 8, bf16")


if __name__ == "__main__":
    main()
