"""Time that a quantized model takes to read a prompt, beside the same model with its weights unpacked to fp32."""

from __future__ import annotations

import gc
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.bench.decode import packed_model
from bitmill.bench.memory import timed
from bitmill.errors import UsageError
from bitmill.progress import peak_memory_bytes
from bitmill.runtime.dense import densify


@torch.no_grad()
def bench_prefill(
    model: str | Path, tokens: int = 512, turns: int = 5, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Read a prompt of `tokens` tokens and choose the next one, with the packed and then with the float weights.

    Returns tokens_per_s and time_to_first_token_s, and float_ of both; ratio of the two speeds; first_call_s, the
    packed model's first prompt, during which kernels lay out their weights; and peak_memory_bytes of the process
    up to the end of the packed run. Times are medians over `turns`. Raises UsageError for a model that is not
    quantized.
    """
    if tokens < 1 or turns < 1:
        raise UsageError(f"tokens is {tokens} and turns is {turns}; use at least 1 of each.")
    live, prompt = packed_model(model, tokens, trust_remote_code)
    first, packed = _times(live, prompt, turns)
    peak = peak_memory_bytes()
    live = densify(live)
    gc.collect()
    _, dense = _times(live, prompt, turns)
    return {
        "model": str(model),
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "tokens_per_s": tokens / packed,
        "float_tokens_per_s": tokens / dense,
        "ratio": dense / packed,
        "time_to_first_token_s": packed,
        "float_time_to_first_token_s": dense,
        "first_call_s": first,
        "peak_memory_bytes": peak,
    }


def _times(live: nn.Module, prompt: Tensor, turns: int) -> tuple[float, float]:
    """Seconds of the first prompt, and the median of those after it."""
    generate: Any = live.generate  # which has the head look at the last token alone
    wanted = {"max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    times = [timed(lambda: generate(prompt, **wanted)) for _ in range(turns + 1)]
    return times[0], median(times[1:])
