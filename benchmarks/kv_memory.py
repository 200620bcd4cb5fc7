"""Measure memory and time of generation after a long text, with an ordinary and with packed caches.

    python benchmarks/kv_memory.py [--model smollm2-135m] [--context 16384] [--methods kvquant:4,kvquant:2]

Each cache has its own process, which reads the text in chunks of 512 tokens, then generates. Its peak resident
memory is compared with that of a process that drops every chunk before the next one, which is the memory of the
model itself: the difference is the cost of the cache. Calibrations use little text, which does not change memory
or time. Written to benchmarks/results/kv_memory.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from bitmill import api
from bitmill.compat import forward_with_cache
from bitmill.data import text
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibrate import calibrate
from bitmill.kv.calibration_file import read_calibration
from bitmill.kv.scheme import kv_method
from bitmill.progress import peak_memory_bytes

RESULTS = Path(__file__).parent / "results" / "kv_memory.json"
PART, NEW = 512, 16
FORGETS, FLOAT = "forgets", "float"


@torch.no_grad()
def worker(name: str, model_name: str, context: int, saved: str) -> dict[str, Any]:
    model: Any = api.load(model_name)
    ids = text.split_stream(text.token_stream("pydoc", api.load_tokenizer(model_name)), "eval")[: context + 1]
    cache: Cache = DynamicCache(config=model.config)
    if name not in (FORGETS, FLOAT):
        kind, bits = name.split(":")
        method = kv_method(kind, int(bits))
        calibration = read_calibration(Path(saved)) if method.scheme().is_calibrated else None
        cache = QuantizedCache(model, method, calibration=calibration)
    started = time.perf_counter()
    for start in range(0, context, PART):
        if name == FORGETS:
            cache = DynamicCache(config=model.config)
        forward_with_cache(model, ids[None, start : start + PART], cache, logits_to_keep=1)
    read_s, times, token = time.perf_counter() - started, [], ids[None, -1:]
    for _ in range(NEW):
        started = time.perf_counter()
        logits = forward_with_cache(model, token, cache)[0].logits
        times.append(time.perf_counter() - started)
        token = logits[:, -1:].argmax(-1)
    kept = cache.allocated_bytes if isinstance(cache, QuantizedCache) else _bytes(cache)
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "cache_bytes": kept,
        "prefill_s": read_s,
        "token_s": statistics.median(times),
    }


def _bytes(cache: Any) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--methods", default="kvquant:4,kvquant:2")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--calibrations", default="/tmp/kv_memory", help="folder for calibrations")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.model, args.context, f"{args.calibrations}/{args.worker}")))
        return
    names = [FORGETS, FLOAT, *args.methods.split(",")]
    model = api.load(args.model)
    ids = text.split_stream(text.token_stream("pydoc", api.load_tokenizer(args.model)), "calib")
    for name in names[2:]:
        kind, bits = name.split(":")
        method = kv_method(kind, int(bits))
        folder = Path(args.calibrations) / name
        folder.mkdir(parents=True, exist_ok=True)
        if method.scheme().is_calibrated:
            calibrate(model, method, ids[: 4 * 256].view(4, 256)).save(folder)
    del model
    rows: dict[str, Any] = {}
    for name in names:
        command = [sys.executable, __file__, "--worker", name, "--model", args.model]
        command += ["--context", str(args.context), "--calibrations", args.calibrations]
        rows[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows[name]["added_bytes"] = rows[name]["peak_memory_bytes"] - rows[FORGETS]["peak_memory_bytes"]
        print(name, json.dumps(rows[name]), flush=True)
    results = {"model": args.model, "context": args.context, "threads": torch.get_num_threads(), "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
