"""Latency of fp8 and 4-bit weights against bfloat16, on a model of 1.1 billion random weights.

    python benchmarks/latency.py --cache FOLDER         # minutes; let the machine do nothing else

Prints milliseconds a decoded token and until the first token after a prompt, medians of one run, and the speed
over bfloat16 as torch runs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import checkpoint
from rich.console import Console
from rich.table import Table

import bitmill
from bitmill.runtime.decode import detach
from bitmill.workflows.bench.models import decode_speed, prefill_time

DECODE, PROMPT, TURNS = 32, 512, 3
RECIPES: dict[str, dict[str, Any]] = {
    "fp8": {"method": "fp8"},
    "fp8, rounded inputs": {"method": "fp8_dynamic"},
    "4 bits, groups of 64": {"method": "rtn", "bits": 4, "group_size": 64},
    "8 bits, rounded inputs": {"method": "w8a8"},
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the models")
    cache = parser.parse_args().cache
    source = checkpoint(cache, 22)
    found = {"bfloat16, torch": latency(detach(bitmill.load(str(source), dtype=torch.bfloat16)))}
    for name, recipe in RECIPES.items():
        out = cache / f"latency-{recipe['method']}"
        if not out.exists():
            bitmill.quantize(str(source), out=out, measure=0, progress=False, **recipe)
        found[name] = latency(bitmill.load(str(out)))
    table = Table()
    for column in ("weights", "ms a token", "x bf16", "ms to the first token", "x bf16"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    first = next(iter(found.values()))
    for name, times in found.items():
        pairs = [(f"{time * 1e3:.1f}", f"{base / time:.2f}") for time, base in zip(times, first)]
        table.add_row(name, *(cell for pair in pairs for cell in pair))
    Console().print(table)


def latency(live: Any) -> tuple[float, float]:
    """Return the seconds of a decoded token, and until the first token after a prompt."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, int(live.config.vocab_size), (1, PROMPT), generator=generator)
    token = 1 / decode_speed(live, prompt[:, :16], DECODE)
    prefill_time(live, prompt)
    return token, median(prefill_time(live, prompt) for _ in range(TURNS))


if __name__ == "__main__":
    main()
