"""Products of many tokens in int8: the share of the processor's peak, and prompts against torch's fp32.

    python benchmarks/gemm.py [--threads 2] [--tokens 512] [--turns 7] > gemm.json

Every ratio comes from one run, in which its parts take turns. Times are seconds of the processor, of all threads
together, so that other work on the machine does not count. A product that is off by more than the rounding of
inputs and tables ends the program. The peak is the rate of the instruction alone, on registers. A prompt is the
linear layers of a model with 1.1B parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bitmill import native
from bitmill.formats import FORMATS, Format
from bitmill.runtime.activations import Activations
from bitmill.runtime.kernels import KernelSpec
from bitmill.runtime.kernels.lut import Lut
from bitmill.workflows.bench.kernels import random_packed

SHAPE = (2048, 5632)
BLOCK = [(2048, 2048)] * 2 + [(256, 2048)] * 2 + [(5632, 2048)] * 2 + [(2048, 5632)]  # q, o, k, v, gate, up, down
BLOCKS = 22
CASES = [
    *(("uniform", bits, 64) for bits in (2, 3, 4, 5, 6, 7, 8)),
    ("uniform", 4, 32),
    ("uniform", 4, 128),
    *(("codebook", bits, "row") for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(("binary_coding", bits, 64) for bits in (2, 3, 4)),
    *(("integer_coding", bits, 64) for bits in (2, 3, 4)),
    ("normal_float", 4, 64),
]
PROMPT = [("uniform", 4, 64), ("codebook", 4, "row"), ("uniform", 8, 64)]
INT8, INT16 = Activations("int8", "int8"), Activations()
LARGEST_ERROR = {"int8": 2e-2, "int16": 1e-3}  # of the outputs of Gaussian inputs, relative
PEAK_ROUNDS = 1_000_000


def made(name: str, bits: int, group_size: Any, shape: tuple[int, int]) -> tuple[Lut, Tensor]:
    """Return the kernel of a random matrix and the matrix as it is decoded."""
    kind: Any = FORMATS.get(name)
    format: Format = kind(bits=bits, group_size=group_size)
    kernel = Lut(KernelSpec(format, shape, torch.device("cpu")), random_packed(format, shape))
    return kernel, kernel.weights(slice(0, shape[0]))


def product(kernel: Lut, setting: Activations, x: Tensor) -> Callable[[], Tensor]:
    """Return a function that multiplies x, once its result is checked."""

    def multiply() -> Tensor:
        kernel.activations = setting
        return kernel.gemm(x)

    return multiply


def check(multiply: Callable[[], Tensor], W: Tensor, x: Tensor, setting: Activations, name: str) -> None:
    """Exit where a product is wrong."""
    expected = x.double() @ W.double().T
    error = float((multiply() - expected).norm() / expected.norm())
    if not error <= LARGEST_ERROR[setting.many]:
        sys.exit(f"{name} in {setting.many} is off by {error:.3g}")


def seconds(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Return the median time of each in turns, in seconds of all threads."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: median(each) for name, each in times.items()}


def add_peak(peaks: list[float], threads: int) -> None:
    """Measure products of bytes a second of a thread, on registers."""
    start = time.process_time()
    count: int = native.native().int8_peak(PEAK_ROUNDS, threads)
    peaks.append(count / (time.process_time() - start))


def shares(tokens: int, turns: int, threads: int) -> list[dict[str, Any]]:
    """Measure every format at one shape."""
    results, x = [], torch.randn(tokens, SHAPE[1])
    for name, bits, group_size in CASES:
        kernel, W = made(name, bits, group_size, SHAPE)
        runs = {setting.many: product(kernel, setting, x) for setting in (INT8, INT16)}
        for setting in (INT8, INT16):
            check(runs[setting.many], W, x, setting, f"{name} of {bits} bits")
        peaks: list[float] = []
        times = seconds({**runs, "peak": partial(add_peak, peaks, threads)}, turns)
        rate = SHAPE[0] * SHAPE[1] * tokens / times["int8"]
        results.append(
            {
                "format": name,
                "bits": bits,
                "group_size": group_size,
                "products_per_thread_s": rate,
                "share_of_peak": rate / median(peaks),
                "speedup_vs_int16": times["int16"] / times["int8"],
            }
        )
        print(f"{name} {bits} {group_size}: {results[-1]['share_of_peak']:.2f} of the peak", file=sys.stderr)
    return results


def prompts(tokens: int, turns: int) -> list[dict[str, Any]]:
    """Measure the linear layers of a prompt against torch's."""
    results = []
    for name, bits, group_size in PROMPT:
        total = {"int8": 0.0, "int16": 0.0, "torch": 0.0}
        for shape in sorted(set(BLOCK)):
            (kernel, W), x = made(name, bits, group_size, shape), torch.randn(tokens, shape[1])
            runs = {setting.many: product(kernel, setting, x) for setting in (INT8, INT16)}
            check(runs["int8"], W, x, INT8, f"{name} of {bits} bits")
            runs["torch"] = partial(torch.nn.functional.linear, x, W)
            times = seconds(runs, turns)
            for key in total:
                total[key] += BLOCKS * BLOCK.count(shape) * times[key]
        results.append(
            {
                "format": name,
                "bits": bits,
                "group_size": group_size,
                "tokens": tokens,
                "seconds": total,
                "speedup_vs_torch_fp32": {key: total["torch"] / total[key] for key in ("int8", "int16")},
            }
        )
        print(f"{name} {bits}: {results[-1]['speedup_vs_torch_fp32']}", file=sys.stderr)
    return results


def main() -> None:
    """Print all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    isa = native.instruction_set()
    figures = {
        "isa": isa,
        "threads": arguments.threads,
        "shape": [*SHAPE, arguments.tokens],
        "shares": shares(arguments.tokens, arguments.turns, arguments.threads),
        "prompts": prompts(arguments.tokens, arguments.turns),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
