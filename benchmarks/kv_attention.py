"""Attention of one token on packed keys and values, beside torch's on floats: `python benchmarks/kv_attention.py`.

Layers take turns, so that no cache holds any of them. torch is given its best: fp32 keys and values as attention
wants them, once with `enable_gqa` and once with the query heads of a kv head as so many queries. Every ratio is
the median of turns in which all are measured one after the other; before anything is timed, the kernel is checked
against fp64 on the numbers that it reads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bitmill.bench.memory import ReadBandwidth, copies_of, timed
from bitmill.kv.base import Side
from bitmill.runtime.kv import Known, attend

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from packed_past import Case, made, off

SHAPES = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (8, 4, 128)}  # kv heads, query heads of each, dim


def cases(tokens: int, bits: list[int]) -> list[tuple[str, str, Case]]:
    """Shape, scheme, and what to attend to."""
    made = []
    for shape, (heads, group, dim) in SHAPES.items():
        size = {"heads": heads, "group": group, "dim": dim, "packed": tokens, "tail": 16}
        for b in bits:
            keys, values = Side(b, "static", outliers=0.01), Side(b, "token", outliers=0.01)
            made.append((shape, f"kvquant-like, {b} bits", Case(keys, values, pre_rope=True, sinks=1, **size)))
            made.append((shape, f"kivi-like, {b} bits", Case(Side(b, "page"), Side(b, "token", 32), **size)))
    return made


def floats(case: Case) -> list[tuple[Tensor, Tensor]]:
    """fp32 keys and values (1, heads, tokens, dim) of so many layers that none stays in a cache."""
    shape = (1, case.heads, case.packed + case.tail, case.dim)
    count = copies_of(8 * case.heads * case.packed * case.dim)
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(count)]


def measure(case: Case, turns: int, memory: ReadBandwidth, layers: list[tuple[Tensor, Tensor]]) -> str:
    """One line of the table."""
    of, scale = made(case), case.dim**-0.5
    q, layer, past, *_ = of
    error = off(attend(q, layer, past, scale), of, scale)
    assert error <= 2.0**-20, f"the kernel is off by {error}"
    size = case.packed // 32 * layer.pages.words * 4
    pasts = [replace(past, slabs=[s.clone() for s in past.slabs]) for _ in range(copies_of(size))]
    kept = [Known() for _ in pasts]
    wide, grouped = q[:, :, None], q.unflatten(1, (case.heads, -1))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def packed() -> None:
        for one, known in zip(pasts, kept):
            attend(q, layer, one, scale, known)

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
    columns = " ".join(f"{1e6 * median(times[name]):>9.0f} us" for name in runs)
    rate = size / median(times["packed"]) / 1e9
    width = 8 * size / (2 * case.packed * case.heads * case.dim)
    return f"{width:>5.2f} {columns} {median(best):>8.2f} x {rate:>6.1f} GB/s {median(shares):>5.0%}"


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--only", default="", help="a part of the shape's or the scheme's name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = ReadBandwidth()
    print(f"{'':<36}  bits       packed   torch, gqa torch, grouped   faster      reads  of bandwidth")
    known: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for shape, scheme, case in cases(arguments.tokens, arguments.bits):
        if arguments.only not in f"{shape}, {scheme}":
            continue
        if shape not in known:
            known = {shape: floats(case)}
        print(f"{shape + ', ' + scheme:<36} {measure(case, arguments.turns, memory, known[shape])}", flush=True)


if __name__ == "__main__":
    main()
