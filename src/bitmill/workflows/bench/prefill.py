"""Time that a quantized model takes to read a prompt, beside the same model with its weights unpacked to fp32."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.errors import UsageError
from bitmill.progress import peak_memory_bytes
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.workflows.bench.decode import packed_model
from bitmill.workflows.bench.memory import timed


@torch.no_grad()
def bench_prefill(
    model: str | Path, tokens: int = 512, turns: int = 5, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Read a prompt of `tokens` tokens and choose the next one, with the packed and the float weights in turns.

    Both models are in memory then: fresh memory is slow, and whoever came second would find it warm.

    Returns tokens_per_s and time_to_first_token_s, and float_ of both; ratio of the two speeds;
    first_call_s, the packed model's first prompt, during which kernels lay out their weights; and
    peak_memory_bytes of the process with the packed model alone. All but the last two are medians over `turns`.
    Raises UsageError for a model that is not quantized.
    """
    if tokens < 1 or turns < 1:
        raise UsageError(f"tokens is {tokens} and turns is {turns}; use at least 1 of each.")
    live, prompt = packed_model(model, tokens, trust_remote_code)
    first = _time(live, prompt)
    _time(live, prompt)
    peak = peak_memory_bytes()
    dense = dequantize_model(packed_model(model, tokens, trust_remote_code)[0])
    _time(dense, prompt)
    times = [(_time(live, prompt), _time(dense, prompt)) for _ in range(turns)]
    packed, floats = (median(each) for each in zip(*times))
    return {
        "model": str(model),
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "tokens_per_s": tokens / packed,
        "float_tokens_per_s": tokens / floats,
        "ratio": floats / packed,
        "time_to_first_token_s": packed,
        "float_time_to_first_token_s": floats,
        "first_call_s": first,
        "peak_memory_bytes": peak,
    }


def _time(live: nn.Module, prompt: Tensor) -> float:
    """Seconds until the first token is chosen."""
    generate: Any = live.generate  # which has the head look at the last token alone
    wanted = {"max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    return timed(lambda: generate(prompt, **wanted))
