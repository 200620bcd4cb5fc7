"""Does the packed cache still find what was said 8000 tokens ago? A pass key hidden in text, asked for at its end.

    python benchmarks/kv_retrieval.py [--model smollm2-135m] [--context 8000] [--keys 10] [--samples 16]

A prompt is text of the evaluation split with a sentence that names a key, at depths spread over the prompt. It is
read in float once; every method packs that cache, reads the question from it and answers, so that all differ by
what is stored alone. Counted: keys that come back exactly, and the mean log-probability of the key's tokens.
Written to benchmarks/results/kv_retrieval.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from bitmill import api
from bitmill.evaluation.generate import CHUNK
from bitmill.kv.base import KVMethod, kv_method
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibrated import Calibration
from bitmill.kv.calibration import learn
from bitmill.kv.recording import record
from bitmill.models import text

RESULTS = Path(__file__).parent / "results" / "kv_retrieval.json"
METHODS = [
    ("kvquant", 4),
    ("kvquant", 3),
    ("kvquant", 2),
    ("kivi", 4),
    ("kivi", 2),
    ("per_token", 4),
    ("per_token", 3),
]


def prompt_of(
    stream: Tensor, tokenizer: Any, context: int, depth: float, key: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of the prompt, of the question and of the answer."""
    needle = _ids(tokenizer, f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
    room = context - len(needle)
    before = int(depth * room)
    haystack = torch.cat([stream[:before], needle, stream[before:room]])
    return haystack, _ids(tokenizer, "\n\nWhat is the pass key? The pass key is"), _ids(tokenizer, f" {key}")


def _ids(tokenizer: Any, string: str) -> Tensor:
    return torch.tensor(tokenizer(string, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def answer(model: Any, cache: Cache, question: Tensor, key: Tensor) -> tuple[bool, float]:
    """Whether the likeliest continuation is the key, and the mean log-probability of its tokens."""
    logits = model(question[None], past_key_values=cache, use_cache=True).logits[0, -1]
    likely, total = True, 0.0
    for token in key:
        total += float(torch.log_softmax(logits.float(), -1)[token])
        likely &= int(logits.argmax()) == int(token)
        logits = model(token[None, None], past_key_values=cache, use_cache=True).logits[0, -1]
    return likely, total / len(key)


@torch.no_grad()
def read(model: Any, haystack: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for start in range(0, len(haystack), CHUNK):
        part = haystack[None, start : start + CHUNK]
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    model, tokenizer = api.load(args.model), api.load_tokenizer(args.model)
    ids = text.token_stream("pydoc", tokenizer)
    calib, stream = text.split_stream(ids, "calib"), text.split_stream(ids, "eval")
    windows = calib[: len(calib) // 2048 * 2048].view(-1, 2048)
    windows = windows[torch.linspace(0, len(windows) - 1, args.samples).long()]
    methods = [kv_method(name, bits) for name, bits in METHODS]
    recording = record(model, windows, fisher=True)
    calibrations = [
        learn(model, method, recording) if method.scheme().is_calibrated else None for method in methods
    ]
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[tuple[bool, float]]] = {}
    for number in range(args.keys):
        key = str(int(torch.randint(10_000, 100_000, (1,), generator=generator)))
        depth = (number + 0.5) / args.keys
        haystack, question, wanted = prompt_of(stream, tokenizer, args.context, depth, key)
        plain = read(model, haystack)
        for method, calibration in zip(methods, calibrations, strict=True):
            packed = _packed(model, method, calibration, plain)
            rows.setdefault(f"{method.name} {method.bits}", []).append(answer(model, packed, question, wanted))
        rows.setdefault("float", []).append(answer(model, plain, question, wanted))
        for name, found in rows.items():
            mean = sum(score for _, score in found) / len(found)
            print(f"{number + 1} {name:12s} {sum(ok for ok, _ in found)}/{len(found)} {mean:8.4f}", flush=True)
    results = {
        name: {
            "found": sum(ok for ok, _ in found),
            "keys": len(found),
            "log_probability": sum(score for _, score in found) / len(found),
        }
        for name, found in rows.items()
    }
    RESULTS.write_text(
        json.dumps({"model": args.model, "context": args.context, "rows": results}, indent=1) + "\n"
    )


def _packed(model: Any, method: KVMethod, calibration: Calibration | None, plain: Cache) -> QuantizedCache:
    return QuantizedCache(model, method, calibration=calibration).take(plain)


if __name__ == "__main__":
    main()
