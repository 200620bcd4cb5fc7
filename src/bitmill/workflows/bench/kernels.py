"""Time of the kernels on layers of common sizes, against torch's fp32 layer and the memory's read bandwidth.

Every value is the median of turns in which the kernel, the float layer and the memory are measured one after the
other, so that other load on the machine affects all three. Weights are cold: copies are used in turns until far
more than the caches hold has been read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from bitmill.errors import UsageError, quoted
from bitmill.formats import FORMATS, Format
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.native import instruction_set, threads
from bitmill.runtime.activations import activations
from bitmill.runtime.kernels import KernelSpec, choose_kernel
from bitmill.runtime.kernels.base import KERNELS
from bitmill.workflows.bench.memory import ReadBandwidth, check_turns, copies_of, linear_time, timed

SHAPES = ((4096, 4096), (4096, 11008))  # (out, in)
_CPU = torch.device("cpu")

# name, bits (of a codebook, where there are some), group size
CASES: tuple[tuple[str, int, int | str], ...] = (
    *(("uniform", bits, 64) for bits in range(1, 9)),
    *(("codebook", bits, "row") for bits in range(1, 9)),
    *(("binary_coding", bits, 128) for bits in range(1, 5)),
    *(("integer_coding", bits, 32) for bits in range(1, 5)),
    ("normal_float", 4, 64),
    ("microscaling", 4, 32),
    ("additive", 8, "row"),
    ("e8", 2, "tensor"),
    *(("pyramid", bits, "row") for bits in (2, 3, 4)),
    *(("trellis", bits, "row") for bits in (2, 3, 4)),
)


def bench_kernels(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    formats: tuple[str, ...] = (),
    bits: tuple[int, ...] = (),
    tokens: int = 1,
    turns: int = 7,
    on_case: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Time the kernel of every case of CASES on every shape.

    Args:
        shapes: (out, in) of the layers.
        formats: only these formats; all when empty.
        bits: only these bits; all when empty.
        tokens: rows of the input.
        turns: measurements, whose median is returned.
        on_case: called with the name of each case before it runs.

    Returns:
        Plain data: threads, isa, activations and read_bandwidth_GBps of the machine, and `kernels`, for every case
        kernel, format, bits, group_size, shape (out, in), tokens, bits_per_weight, time_s, GBps (of packed bytes),
        fraction_of_read_bandwidth and speedup_vs_torch_fp32.

    Raises:
        UsageError: there is no such case, a number is out of range, or a layer does not fit into the memory.
    """
    _check_arguments(shapes, formats, bits, tokens, turns)
    memory, results, bandwidths = ReadBandwidth(), [], []
    for shape in shapes:
        x = torch.randn(tokens, shape[1])
        floats = [torch.randn(shape) for _ in range(copies_of(4 * shape[0] * shape[1]))]
        for format in _cases(formats, bits):
            on_case(f"{format!r} {shape[0]} x {shape[1]}")
            result, reads = _measure(format, shape, x, floats, memory, turns)
            results.append(result)
            bandwidths += reads
    return {
        **machine_of_kernels(),
        "read_bandwidth_GBps": median(bandwidths) / 1e9 if bandwidths else None,
        "kernels": results,
    }


def machine_of_kernels() -> dict[str, Any]:
    """Return threads, isa and activations, on which times of kernels depend."""
    return {"threads": threads(), "isa": instruction_set(), "activations": activations().name}


def _check_arguments(
    shapes: tuple[tuple[int, int], ...], formats: tuple[str, ...], bits: tuple[int, ...], tokens: int, turns: int
) -> None:
    """Raise UsageError for what cannot be measured."""
    check_turns(turns)
    if tokens < 1:
        raise UsageError(f"--tokens is {tokens}; use at least 1.")
    names = sorted({name for name, _, _ in CASES})
    if unknown := [name for name in formats if name not in names]:
        raise UsageError(f"--format is {quoted(unknown[0])}; use one of {', '.join(names)}.")
    if not any(_cases(formats, bits)):
        widths = sorted({width for name, width, _ in CASES if not formats or name in formats})
        raise UsageError(f"--bits is {', '.join(map(str, bits))}; use some of {', '.join(map(str, widths))}.")
    free = psutil.virtual_memory().available
    for out, inputs in shapes:
        floats = out * inputs * copies_of(4 * out * inputs) + tokens * (out + inputs)
        if 4 * floats > free:
            raise UsageError(
                f"--shape {out}x{inputs} with {tokens} tokens needs more memory than the {free / 1e9:.1f} GB that "
                "are free; use a smaller layer, or fewer tokens."
            )


def _cases(formats: tuple[str, ...], bits: tuple[int, ...]) -> Iterator[Format]:
    for name, width, group_size in CASES:
        if (not formats or name in formats) and (not bits or width in bits):
            yield FORMATS.get(name)(bits=width, group_size=group_size)  # type: ignore[call-arg]


def _measure(
    format: Format,
    shape: tuple[int, int],
    x: Tensor,
    floats: list[Tensor],
    memory: ReadBandwidth,
    turns: int,
) -> tuple[dict[str, Any], list[float]]:
    """Return the row of one case, and the read bandwidths measured between its turns, bytes per second."""
    spec = KernelSpec(format, shape, _CPU)
    kind = choose_kernel(spec)
    kernel = kind(spec, random_packed(format, shape))
    size = format.stored_bits(shape) / 8
    kernels = [kernel, *(copy.deepcopy(kernel) for _ in range(copies_of(int(size)) - 1))]
    reads, times, fractions, speedups = [], [], [], []
    with torch.no_grad():
        kernel.apply(x)
        for _ in range(turns):
            read = memory.measure()
            time_s = timed(lambda: [k.apply(x) for k in kernels]) / len(kernels)
            reads.append(read)
            times.append(time_s)
            fractions.append(size / time_s / read)
            speedups.append(linear_time(floats, x) / time_s)
    return {
        "kernel": KERNELS.name_of(kind),
        "format": format.name,
        "bits": int(format.rate) if format.rate.is_integer() else format.rate,
        "group_size": getattr(format, "group_size", None),
        "shape": list(shape),
        "tokens": x.shape[0],
        "bits_per_weight": 8 * size / (shape[0] * shape[1]),
        "time_s": median(times),
        "GBps": size / median(times) / 1e9,
        "fraction_of_read_bandwidth": median(fractions),
        "speedup_vs_torch_fp32": median(speedups),
    }, reads


def random_packed(format: Format, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Return random packed tensors of a layer; speed does not depend on the values.

    Not every integer is the code of a pyramid point: those are quantized from 64 random rows, repeated.

    Args:
        format: of the layer.
        shape: (out, in).
        seed: of the random numbers.

    Returns:
        Tensors by name: random codes, and parameters between 0.001 and 0.021.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(format, Pyramid):
        W = torch.randn(min(64, shape[0]), shape[1], generator=generator) * 0.02
        packed = nearest_matrix(format, W, fit_matrix(format, W, None, False)).pack()
        rows = torch.arange(shape[0]) % len(W)
        return {name: t[rows] if len(t) == len(W) else t for name, t in packed.items()}
    tensors = {}
    for name, (size, dtype) in format.layout(shape).items():
        if dtype.is_floating_point:
            tensors[name] = (torch.rand(size, generator=generator) * 0.02 + 0.001).to(dtype)
        else:
            tensors[name] = torch.randint(-(1 << 31), 1 << 31, size, generator=generator).to(dtype)
    return tensors
