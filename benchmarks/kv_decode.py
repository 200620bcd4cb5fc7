"""Time the compiled decode step with an ordinary and with packed caches: `python benchmarks/kv_decode.py`.

    python benchmarks/kv_decode.py [--model smollm2-135m] [--contexts 100,2000,16384] [--methods kvquant:4,kivi:4]

Caches are filled with random numbers, and calibrated on little text: neither changes the time. For every context
the caches decode 32 tokens one after the other, which packs a page of every layer once; times include packing, and
ratios are medians over rounds. Written to benchmarks/results/kv_decode.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from bitmill import api
from bitmill.compat import forward_with_cache
from bitmill.data import text
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibrate import calibrate
from bitmill.kv.scheme import PAGE, kv_method
from bitmill.native import native
from bitmill.runtime.decode import decode_path

RESULTS = Path(__file__).parent / "results" / "kv_decode.json"
FLOAT = "float"


def calibrations(model: Any, name: str, methods: list[str]) -> dict[str, Any]:
    """Return method and calibration, None where it needs none, by name."""
    ids = text.split_stream(text.token_stream("pydoc", api.load_tokenizer(name)), "calib")[: 4 * 256].view(4, 256)
    made: dict[str, Any] = {}
    for method in methods:
        kind, bits = method.split(":")
        resolved = kv_method(kind, int(bits))
        made[method] = resolved, calibrate(model, resolved, ids) if resolved.scheme().is_calibrated else None
    return made


def filled(model: Any, context: int) -> DynamicCache:
    """Return an ordinary cache of random numbers."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 1, config.num_key_value_heads, context, dim), layer)
    return cache


def decoded(model: Any, cache: Cache, count: int = PAGE) -> float:
    """Return the seconds per token."""
    token = torch.tensor([[7]])
    started = time.perf_counter()
    for _ in range(count):
        token = forward_with_cache(model, token, cache)[0].logits[:, -1:].argmax(-1)
    return (time.perf_counter() - started) / count


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", default="100,2000,16384")
    parser.add_argument("--methods", default="kvquant:4,kivi:4")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model: Any = api.load(args.model)
    with torch.enable_grad():
        methods = calibrations(model, args.model, args.methods.split(","))
    rows: dict[str, Any] = {}
    for context in map(int, args.contexts.split(",")):
        own = filled(model, context)
        caches: dict[str, Cache] = {
            name: QuantizedCache(model, method, calibration=found).take(own)
            for name, (method, found) in methods.items()
        }
        caches[FLOAT] = own
        for cache in caches.values():
            decoded(model, cache, 3)  # the first token is decoded both ways and compared
        paths = {name: decode_path(model, cache) for name, cache in caches.items()}
        times: dict[str, list[float]] = {name: [] for name in caches}
        for _ in range(args.turns):
            for name, cache in caches.items():
                times[name].append(decoded(model, cache))
        row = {name: {"token_ms": 1e3 * median(each), "path": paths[name]} for name, each in times.items()}
        for name in methods:
            ratios = [a / b for a, b in zip(times[FLOAT], times[name])]
            row[name] |= {"faster": median(ratios), "turns": ratios}
        rows[str(context)] = row
        milliseconds = ", ".join(f"{name} {v['token_ms']:.1f} ms" for name, v in row.items())
        faster = ", ".join(f"{row[name]['faster']:.2f} x" for name in methods)
        print(f"{context:>6} tokens: {milliseconds}; speedup: {faster}", flush=True)
    about = {"model": args.model, "threads": args.threads, "turns": args.turns, "isa": native().isa()}
    args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
