"""Compare attention of one token on packed keys and values with torch's: `python benchmarks/kv_attention.py`.

Written to benchmarks/results/kv_attention.json (--out), unless --only is given.

Layers alternate, so that none stays in a CPU cache. torch runs in its fastest form: contiguous fp32 keys and
values, once with `enable_gqa` and once with the query heads of a kv head as separate queries. Every ratio is the
median over rounds that measure all variants one after the other; before timing, the kernel is checked against
fp64 on the numbers that it reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bitmill.kv.scheme import kv_method
from bitmill.native import native
from bitmill.runtime.attention.dispatch import NativeTokenViews, attend
from bitmill.workflows.bench.memory import ReadBandwidth, copies_of, timed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.packed_past import Case, made, off

RESULTS = Path(__file__).parent / "results" / "kv_attention.json"
SHAPES = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (8, 4, 128)}  # kv heads, query heads of each, dim


Layers = list[tuple[Tensor, Tensor]]  # keys and values


def cases(tokens: int, bits: list[int]) -> list[tuple[str, str, Case]]:
    """Return name of the shape, name of the scheme, and tokens to attend to."""
    made = []
    for shape, (heads, group, dim) in SHAPES.items():
        size = {"heads": heads, "group": group, "dim": dim, "packed": tokens}
        for name, b in ((name, b) for b in bits for name in ("kvquant", "kivi")):
            scheme = kv_method(name, b).scheme()
            rest = {"pre_rope": scheme.pre_rope, "sinks": scheme.sink, "tail": scheme.residual + 16}
            made.append((shape, f"{name}, {b} bits", Case(scheme.keys, scheme.values, **rest, **size)))
    return made


def floats(case: Case) -> Layers:
    """Return fp32 keys and values (1, heads, tokens, dim) of enough layers that none stays in a CPU cache."""
    shape = (1, case.heads, case.packed + case.tail, case.dim)
    count = copies_of(8 * case.heads * case.packed * case.dim)
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(count)]


def measure(
    case: Case, turns: int, memory: ReadBandwidth, layers: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Return one row of the table."""
    of, scale = made(case), case.dim**-0.5
    q, layer, past, *_ = of
    error = off(attend(q, layer, past, scale), of, scale)
    assert error <= 2.0**-20, f"the kernel is off by {error}"
    size = case.packed // 32 * layer.pages.words * 4
    pasts = [replace(past, slabs=[s.clone() for s in past.slabs]) for _ in range(copies_of(size))]
    views = [NativeTokenViews() for _ in pasts]
    wide, grouped = q[:, :, None], q.unflatten(1, (case.heads, -1))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def packed() -> None:
        for one, view in zip(pasts, views):
            attend(q, layer, one, scale, view)

    runs = {
        "packed": (packed, len(pasts)),
        "gqa": (lambda: [sdpa(wide, k, v, enable_gqa=True) for k, v in layers], len(layers)),
        "grouped": (lambda: [sdpa(grouped, k, v) for k, v in layers], len(layers)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    shares = []
    for turn in range(turns + 1):
        read = memory.measure()
        for name, (run, count) in runs.items():
            time = timed(run) / count
            if turn:  # the first warms up
                times[name].append(time)
        if turn:
            shares.append(size / times["packed"][-1] / read)
    best = [min(a, b) / c for a, b, c in zip(times["gqa"], times["grouped"], times["packed"])]
    return {
        "bits": 8 * size / (2 * case.packed * case.heads * case.dim),
        **{f"{name}_s": median(times[name]) for name in runs},
        "ratio": median(best),
        "GBps": size / median(times["packed"]) / 1e9,
        "fraction_of_read_bandwidth": median(shares),
    }


def line(row: dict[str, float]) -> str:
    """Return a row as text."""
    columns = " ".join(f"{1e6 * row[f'{name}_s']:>9.0f} us" for name in ("packed", "gqa", "grouped"))
    share = row["fraction_of_read_bandwidth"]
    return f"{row['bits']:>5.2f} {columns} {row['ratio']:>8.2f} x {row['GBps']:>6.1f} GB/s {share:>5.0%}"


@torch.no_grad()
def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--only", default="", help="substring of the shape's or scheme's name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = ReadBandwidth()
    print(f"{'':<36}  bits       packed   torch, gqa torch, grouped  speedup      reads  of bandwidth")
    layers: dict[str, Layers] = {}
    rows: dict[str, dict[str, float]] = {}
    for shape, scheme, case in cases(arguments.tokens, arguments.bits):
        if arguments.only not in f"{shape}, {scheme}":
            continue
        if shape not in layers:
            layers = {shape: floats(case)}
        rows[f"{shape}, {scheme}"] = row = measure(case, arguments.turns, memory, layers[shape])
        print(f"{shape + ', ' + scheme:<36} {line(row)}", flush=True)
    if not arguments.only:
        about = {"tokens": arguments.tokens, "threads": arguments.threads, "turns": arguments.turns}
        about |= {"isa": native().isa(), "measured": str(date.today()), "rows": rows}
        arguments.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
