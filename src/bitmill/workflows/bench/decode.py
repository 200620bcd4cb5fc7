"""Tokens a second of a quantized model, beside the same model with its weights unpacked to fp32."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.checkpoint.reader import is_checkpoint
from bitmill.compat import forward_with_cache
from bitmill.errors import UsageError
from bitmill.progress import peak_memory_bytes
from bitmill.runtime.decode import decode_path, detach
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.workflows.load import load

_PROMPT = 16


@torch.no_grad()
def bench_decode(model: str | Path, tokens: int = 64, trust_remote_code: bool = False) -> dict[str, Any]:
    """Decode `tokens` tokens, one at a time, with the packed and then with the float weights.

    Returns tokens_per_s, float_tokens_per_s, ratio, peak_memory_bytes of the process up to the end of the packed
    run, and path: "step" where the packed model decodes by the compiled step, or why it does not. The float model
    runs by transformers' own forward. Times are medians over the tokens. Raises UsageError for a model that is not
    quantized.
    """
    if tokens < 2:
        raise UsageError(f"tokens is {tokens}; use at least 2.")
    live, prompt = packed_model(model, _PROMPT, trust_remote_code)
    packed = _tokens_per_s(live, prompt, tokens)
    peak = peak_memory_bytes()
    path = decode_path(live)
    live = dequantize_model(detach(live))
    gc.collect()
    dense = _tokens_per_s(live, prompt, tokens)
    return {
        "model": str(model),
        "path": path,
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "tokens_per_s": packed,
        "float_tokens_per_s": dense,
        "ratio": packed / dense,
        "peak_memory_bytes": peak,
    }


def packed_model(model: str | Path, tokens: int, trust_remote_code: bool) -> tuple[Any, Tensor]:
    """The model of a quantized folder, and a prompt (1, tokens). Raises UsageError for one that is none."""
    if not is_checkpoint(Path(model)):
        raise UsageError(f"{model} is no quantized folder; write one with bitmill quantize {model} -o DIR.")
    live: Any = load(model, trust_remote_code=trust_remote_code)
    generator = torch.Generator().manual_seed(0)
    return live, torch.randint(0, int(live.config.vocab_size), (1, tokens), generator=generator)


def _tokens_per_s(live: nn.Module, prompt: Tensor, tokens: int) -> float:
    cache, step, times = None, prompt, []
    for _ in range(tokens + 2):
        started = time.perf_counter()
        output, cache = forward_with_cache(live, step, cache)
        step = output.logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - started)
    return 1 / median(times[2:])  # the first read the prompt, the second prepared the step
