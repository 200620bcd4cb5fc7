"""The peak memory of a process that runs a folder at a context, measured.

    python -m bitmill.workflows.budget.peak FOLDER TOKENS     # one line of JSON
    python -m bitmill.workflows.budget.peak                   # of the program alone, with a model of a few kB

The cache is filled with random keys and values, as bytes do not depend on them, up to the last part of a prompt;
that part and two further tokens are computed as `generate` does. So the peak is that of the whole text in the time
of a short one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from bitmill.compat import forward_with_cache
from bitmill.errors import BitmillError
from bitmill.evaluation.generate import PROMPT_CHUNK
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.layer import QuantizedLayer
from bitmill.models.kv_shapes import kv_heads_and_dim
from bitmill.progress import peak_memory_bytes

_DECODED = 2  # tokens after the prompt
_TINY = 64  # tokens of the run that measures the program
_LIMIT_S = 1800


class PeakNotMeasured(BitmillError):
    """The process that measures the peak has ended without a figure."""


def measured_peak(folder: Path | None, tokens: int = _TINY, trust_remote_code: bool = False) -> int:
    """Return the peak memory of a process of its own that runs a folder at a context, in bytes.

    Args:
        folder: a quantized folder; None for the program alone.
        tokens: of the context.
        trust_remote_code: load code in the folder.

    Raises:
        PeakNotMeasured: the process has ended without a figure, as where memory is short.
    """
    command = [sys.executable, "-P", "-m", "bitmill.workflows.budget.peak"]
    if folder is not None:
        command += [str(folder), str(tokens), *["trust"] * trust_remote_code]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
        return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])
    except (subprocess.TimeoutExpired, IndexError, KeyError, ValueError) as error:
        said = done.stderr.strip().splitlines()[-1:] if not isinstance(error, subprocess.TimeoutExpired) else []
        reason = (
            " ".join(said[0].split())
            if said
            else "the process was killed, failed without a word, or took too long"
        )
        raise PeakNotMeasured(f"The peak memory at {tokens:,} tokens was not measured ({reason}).") from None


@torch.no_grad()
def run_at(model: Any, cache: Cache, tokens: int) -> None:
    """Fill a cache up to the last part of a prompt of `tokens` tokens, compute that part, and decode two tokens.

    Args:
        model: a decoder.
        cache: an empty cache of it.
        tokens: of the prompt and of what follows it.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    last = min(PROMPT_CHUNK, max(1, tokens - _DECODED))
    fill(model, cache, tokens - _DECODED - last, generator)
    for count in (last, *[1] * _DECODED):
        part = torch.randint(0, vocabulary, (1, count), generator=generator)
        forward_with_cache(model, part, cache, **({"logits_to_keep": 1} if count > 1 else {}))


def fill(model: Any, cache: Cache, tokens: int, generator: torch.Generator) -> None:
    """Append random keys and values to every layer of a cache, as many at a time as a prompt is read in."""
    heads, dim = kv_heads_and_dim(model.config.get_text_config(decoder=True), type(model).__name__)
    for begin in range(0, tokens, PROMPT_CHUNK):
        shape = (1, heads, min(PROMPT_CHUNK, tokens - begin), dim)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        for number, layer in enumerate(cache.layers):
            if isinstance(layer, QuantizedLayer):
                if not layer.is_initialized:
                    layer.lazy_initialization(keys, values)
                layer.append(keys, values)
            else:
                cache.update(keys, values, number)


def _tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)).eval()


def main(arguments: list[str]) -> None:
    """Run, and print the peak."""
    from bitmill.workflows.kv import CacheFactory
    from bitmill.workflows.load import load

    if not arguments:
        model: Any = _tiny_model()
        run_at(model, QuantizedCache(model, "kivi"), _TINY)
    else:
        folder, tokens = arguments[0], int(arguments[1])
        model = load(folder, trust_remote_code=len(arguments) > 2)
        cache = CacheFactory(model, None, folder).new() or DynamicCache(config=model.config)
        run_at(model, cache, tokens)
    print(json.dumps({"peak_memory_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1:])
