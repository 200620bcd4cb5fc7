"""Measure retrieval from packed caches: numbers in a long text, queried at its end.

    python benchmarks/kv_retrieval.py [--contexts 8000,8000,4000,4000] [--keys 12] [--samples 16] [--develop]

Blocks are inserted into the text at even depths: words that occur nowhere else in it, followed by a number, stated
twice. The question repeats the words, and the number must follow. A text is read in float once; every method packs
that cache and answers each question from a copy, token by token, so that rows differ only by the stored cache and
no answer is in the cache of another question. Counted are the numbers whose tokens are all the most likely ones,
and the mean log-probability of their tokens. Each finished text is added to
benchmarks/results/kv_retrieval.json; texts in it are not measured again.

--develop queries the float model only, on the calibration split, and writes nothing: the form of the blocks and
the lengths were chosen there.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from bitmill import api
from bitmill.compat import forward_with_cache
from bitmill.data import text
from bitmill.evaluation.generate import PROMPT_CHUNK
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibrate import fit_calibration, record_keys_values
from bitmill.kv.calibration_file import KVCalibration
from bitmill.kv.scheme import KVMethod, kv_method

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
WORDS, DIGITS = 4, 4
FRAMES = [
    "The number of the {} is",
    "line {}:",
    "Tickets for {} cost",
    "{} was born in the year",
    "Call {} by telephone at",
    "Miles to {}:",
    "{} =",
    "Error code of {}:",
    "The {} weighs exactly",
    "Population of {} -",
    "The {} opened its doors on day",
    "Room for {} guests: no.",
]


@dataclass(frozen=True)
class Key:
    """Token ids of the block inserted into the text, of the question, and of the answer."""

    block: Tensor
    question: Tensor
    answer: Tensor


def keys_of(tokenizer: Any, ids: Tensor, count: int, generator: torch.Generator) -> list[Key]:
    """Return keys of words that are one token each, in no other key, and nowhere in the text `ids`."""
    used = set(ids.tolist())
    words = sorted(
        word[1:]
        for word, number in tokenizer.get_vocab().items()
        if re.fullmatch("\u0120[a-z]{5,8}", word) and number not in used
    )
    order = torch.randperm(len(words), generator=generator).tolist()
    keys = []
    for key in range(count):
        cue = " ".join(words[i] for i in order[WORDS * key : WORDS * (key + 1)])
        number = int(torch.randint(10 ** (DIGITS - 1), 10**DIGITS, (1,), generator=generator))
        question, answer = "\n\n" + FRAMES[key % len(FRAMES)].format(cue), f" {number}"
        block = f"{question}{answer}.{question}{answer}.\n\n"
        keys.append(Key(*(_ids(tokenizer, part) for part in (block, question, answer))))
    return keys


def _ids(tokenizer: Any, string: str) -> Tensor:
    return torch.tensor(tokenizer(string, add_special_tokens=False)["input_ids"])


def hidden(stream: Tensor, keys: list[Key], context: int) -> tuple[Tensor, int]:
    """Return `context` tokens of text with the keys' blocks, and how many of them are from `stream`."""
    room = context - sum(len(key.block) for key in keys)
    parts, last = [], 0
    for number, key in enumerate(keys):
        cut = int((number + 0.5) / len(keys) * room)
        parts += [stream[last:cut], key.block]
        last = cut
    return torch.cat([*parts, stream[last:room]]), room


@torch.no_grad()
def read(model: Any, tokens: Tensor) -> DynamicCache:
    """Return the float cache of a text."""
    cache = DynamicCache(config=model.config)
    for start in range(0, len(tokens), PROMPT_CHUNK):
        part = tokens[None, start : start + PROMPT_CHUNK]
        forward_with_cache(model, part, cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def answered(model: Any, cache: Cache, key: Key) -> list[tuple[int, float]]:
    """Return, for each token of the answer, the most likely token in its place and its own log-probability."""
    cache, found = copy.deepcopy(cache), []
    output, _ = forward_with_cache(model, key.question[None], cache, logits_to_keep=1)
    for token in key.answer:
        logits = output.logits[0, -1]
        found.append((int(logits.argmax()), float(torch.log_softmax(logits.float(), -1)[token])))
        output, _ = forward_with_cache(model, token[None, None], cache)
    return found


def calibrated(model: Any, windows: Tensor) -> list[tuple[str, KVMethod, KVCalibration | None]]:
    """Return names of rows, methods, and the calibrations of those that need one."""
    methods, rows = [kv_method(name, bits) for name, bits in METHODS], []
    recording = record_keys_values(model, windows, fisher=True)
    for method in methods:
        calibration = fit_calibration(model, method, recording) if method.scheme().is_calibrated else None
        rows.append((f"{method.name} {method.bits}", method, calibration))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--contexts", default="8000,8000,4000,4000", help="tokens of each text, one after the other"
    )
    parser.add_argument("--keys", type=int, default=12, help="in each text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--develop", action="store_true")
    args = parser.parse_args()
    model, tokenizer = api.load(args.model), api.load_tokenizer(args.model)
    ids = text.token_stream("pydoc", tokenizer)
    calib, stream = text.split_stream(ids, "calib"), text.split_stream(ids, "eval")
    contexts = [int(context) for context in args.contexts.split(",")]
    about = {"model": args.model, "contexts": contexts, "keys": args.keys, "samples": args.samples}
    results: dict[str, Any] = about | {"texts": []}
    if RESULTS.is_file() and not args.develop:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        if any(results[name] != value for name, value in about.items()):
            raise SystemExit(
                f"{RESULTS} was measured with other settings; move it away, or use its model and numbers."
            )
    methods = []
    if args.develop:
        stream = calib[len(calib) // 3 :]
    else:
        windows = calib[: len(calib) // 2048 * 2048].view(-1, 2048)
        methods = calibrated(model, windows[torch.linspace(0, len(windows) - 1, args.samples).long()])
    keys = keys_of(tokenizer, ids, args.keys * len(contexts), torch.Generator().manual_seed(int(args.develop)))
    for number, context in enumerate(contexts):
        queried = keys[args.keys * number : args.keys * (number + 1)]
        tokens, taken = hidden(stream, queried, context)
        stream = stream[taken:]
        if number < len(results["texts"]):
            continue
        plain, rows = read(model, tokens), {}
        print(f"{len(tokens)} tokens", flush=True)
        for name, method, calibration in [("float", None, None), *methods]:
            cache = QuantizedCache(model, method, calibration=calibration).take(plain) if method else plain
            rows[name] = _row([answered(model, cache, key) for key in queried], queried)
            print(f"{name:12s} {rows[name]['found']} {rows[name]['log_probability']:8.4f}", flush=True)
        results["texts"].append(
            {"context": context, "answer_tokens": sum(len(key.answer) for key in queried), "rows": rows}
        )
        if not args.develop:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _row(answers: list[list[tuple[int, float]]], keys: list[Key]) -> dict[str, Any]:
    """Return the row of a method.

    found: "x" for each key that was retrieved exactly, in the order of the text, else ".".  likeliest: the most
    likely tokens in place of each answer's.  log_probability: mean over the answers' tokens.
    """
    likeliest = [[token for token, _ in answer] for answer in answers]
    log_p = [log_p for answer in answers for _, log_p in answer]
    return {
        "found": "".join(".x"[these == key.answer.tolist()] for these, key in zip(likeliest, keys, strict=True)),
        "likeliest": [" ".join(map(str, these)) for these in likeliest],
        "log_probability": sum(log_p) / len(log_p),
    }


if __name__ == "__main__":
    main()
