"""Tokens per second of a quantized model, decoding and reading a prompt, and of this model unpacked to fp32.

The packed model is measured first. The float one is left out, with a sentence, where it does not fit into memory.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from bitmill.checkpoint.reader import is_checkpoint
from bitmill.compat import forward_with_cache
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import UsageError
from bitmill.evaluation.context import context_length
from bitmill.progress import peak_memory_bytes
from bitmill.report.text import format_mb
from bitmill.runtime.activations import activations
from bitmill.runtime.decode import decode_path, detach
from bitmill.runtime.modules.dequantize import dequantize_model, dequantized_bytes
from bitmill.workflows.bench.memory import check_turns, timed
from bitmill.workflows.load import load

_DECODE_PROMPT = 16  # tokens


@torch.no_grad()
@checked_arguments()
def bench_decode(model: str | Path, tokens: int = 64, trust_remote_code: bool = False) -> dict[str, Any]:
    """Decode `tokens` tokens, one at a time, with the packed and then with the float weights.

    Times are medians over the tokens. The float model runs by transformers' own forward.

    Returns:
        tokens_per_s, float_tokens_per_s and their ratio, None and None with `float_left_out` saying why where the
        float weights do not fit into memory; peak_memory_bytes of the process until the packed run ends; path,
        "step" where the packed model decodes by the compiled step, otherwise the reason.

    Raises:
        UsageError: the model is not quantized, or there are fewer than 2 tokens.
    """
    if tokens < 2:
        raise UsageError(f"tokens is {tokens}; use at least 2.")
    live, prompt = load_packed(model, _DECODE_PROMPT, trust_remote_code, further=tokens)
    packed = decode_speed(live, prompt, tokens)
    peak = peak_memory_bytes()
    path = decode_path(live)
    left_out = _float_left_out(live)
    dense = None
    if left_out is None:
        live = dequantize_model(detach(live))
        gc.collect()
        dense = decode_speed(live, prompt, tokens)
    return {
        "model": str(model),
        "path": path,
        "threads": torch.get_num_threads(),
        "activations": activations().name,
        "tokens": tokens,
        "tokens_per_s": packed,
        "float_tokens_per_s": dense,
        "ratio": dense and packed / dense,
        "float_left_out": left_out,
        "peak_memory_bytes": peak,
    }


@torch.no_grad()
@checked_arguments()
def bench_prefill(
    model: str | Path, tokens: int = 512, turns: int = 5, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Read a prompt of `tokens` tokens and choose the next one, with the packed and the float weights in turns.

    Both models stay in memory: newly allocated memory is slow, and a second model would reuse that of the first.
    Times are medians over `turns`.

    Returns:
        tokens_per_s and time_to_first_token_s, and float_ of both; ratio of the two speeds; first_call_s, the
        packed model's first prompt, during which kernels repack their weights; peak_memory_bytes of the process
        with the packed model alone. The figures of the float model are None, and `float_left_out` says why, where
        it does not fit into memory.

    Raises:
        UsageError: the model is not quantized, or tokens is below 1, or turns is not from 1 to 1000.
    """
    check_turns(turns)
    if tokens < 1:
        raise UsageError(f"--tokens is {tokens}; use at least 1.")
    live, prompt = load_packed(model, tokens, trust_remote_code)
    first = prefill_time(live, prompt)
    prefill_time(live, prompt)
    peak = peak_memory_bytes()
    models = [live]
    left_out = _float_left_out(live)
    if left_out is None:
        models.append(dequantize_model(detach(load_packed(model, tokens, trust_remote_code)[0])))
        prefill_time(models[-1], prompt)
    times = [[prefill_time(each, prompt) for each in models] for _ in range(turns)]
    packed, *dense = (median(each) for each in zip(*times))
    floats = dense[0] if dense else None
    return {
        "model": str(model),
        "threads": torch.get_num_threads(),
        "activations": activations().name,
        "tokens": tokens,
        "tokens_per_s": tokens / packed,
        "float_tokens_per_s": floats and tokens / floats,
        "ratio": floats and floats / packed,
        "float_left_out": left_out,
        "time_to_first_token_s": packed,
        "float_time_to_first_token_s": floats,
        "first_call_s": first,
        "peak_memory_bytes": peak,
    }


def load_packed(model: str | Path, tokens: int, trust_remote_code: bool, further: int = 0) -> tuple[Any, Tensor]:
    """Load a quantized folder.

    Args:
        model: the folder.
        tokens: of the prompt.
        trust_remote_code: allow Python code in the folder to run.
        further: tokens that are decoded after the prompt.

    Returns:
        The model, and a random prompt (1, tokens).

    Raises:
        UsageError: the folder is not quantized, or its context is shorter.
    """
    if not is_checkpoint(user_path(model)):
        raise UsageError(f"{model} is no quantized folder; write one with bitmill quantize {model} -o DIR.")
    live: Any = load(model, trust_remote_code=trust_remote_code)
    limit = context_length(live.config)
    if limit is not None and tokens + further > limit:
        raise UsageError(
            f"{model} reads at most {limit} tokens, and this needs {tokens + further}; lower --tokens (tokens)."
        )
    generator = torch.Generator().manual_seed(0)
    return live, torch.randint(0, int(live.config.vocab_size), (1, tokens), generator=generator)


def _float_left_out(live: nn.Module) -> str | None:
    """Return one sentence on why the float weights are not measured; None where they fit into memory."""
    needed, free = dequantized_bytes(live), psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"Its float32 weights need {format_mb(needed)} and {format_mb(free)} of memory are free."


def decode_speed(live: nn.Module, prompt: Tensor, tokens: int) -> float:
    """Return tokens per second of decoding, the median over `tokens` steps."""
    cache, step, times = None, prompt, []
    for _ in range(tokens + 2):
        started = time.perf_counter()
        output, cache = forward_with_cache(live, step, cache)
        step = output.logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - started)
    return 1 / median(times[2:])  # the first reads the prompt, the second prepares the compiled step


def prefill_time(live: nn.Module, prompt: Tensor) -> float:
    """Return the seconds until the first token is chosen."""
    generate: Any = live.generate  # computes logits of the last token only
    mask = torch.ones_like(prompt)
    return timed(lambda: generate(prompt, max_new_tokens=1, do_sample=False, attention_mask=mask))
