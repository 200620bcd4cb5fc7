"""Triton kernels on a GPU: packed bytes a second relative to the device's bandwidth, times relative to torch in
bf16.

One token by default. A line counts only if the kernel's result is right: every case is first compared with decode
and matmul in fp64. Bandwidth is that of a copy on the device (bytes read and written), measured in the same run.
Weights rotate over copies that are together larger than the cache; launches are replayed from a CUDA graph, so
that what is timed is the kernels.

    python benchmarks/gpu_kernels.py                    # one JSON object; minutes, most of it compilation
    python benchmarks/gpu_kernels.py --tokens 16 --formats uniform codebook
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py --shapes 8x96 16x64 --bits 3    # the logic alone, no times
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitmill.formats import FORMATS, Format
from bitmill.formats.quantized import unpack
from bitmill.runtime.kernels import KernelSpec
from bitmill.runtime.kernels.triton import Triton
from bitmill.runtime.triton.available import is_interpreted, unsupported_reason

SHAPES = ["4096x4096", "4096x11008", "8192x28672"]
FORMATS_MEASURED = ["uniform", "codebook", "binary_coding", "integer_coding", "additive"]
ROTATED_BYTES = 256 << 20  # several times the largest cache
COPIED_BYTES = 4 << 30
MAX_COPIES = 64
REPEATS = 20
ALLOWED = 2e-2  # |y - x W^^T| / |x W^^T| in bf16


def format_of(name: str, bits: int) -> Format | None:
    """Return a format with about `bits` bits a weight, or None.

    Args:
        name: Name of the format.
        bits: Bits a weight.
    """
    kind = FORMATS.get(name)
    if name == "additive":  # codes of 8 bits, one codebook for each bit a weight
        return kind(8, codebooks=bits)
    if bits > kind.max_bits:
        return None
    if name == "codebook":
        return kind(bits)
    return kind(bits, 32 if name == "integer_coding" else 64)


def random_packed(format: Format, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Return random packed tensors with weights near 0.01.

    Args:
        format: The format.
        shape: (rows, columns).
        device: Device of the tensors.
    """
    tensors = {}
    for name, (size, dtype) in format.layout(shape).items():
        if dtype.is_floating_point:
            numbers = torch.rand(size, device=device) * 0.01 + 0.005
            if name in ("table", "codebooks"):
                numbers -= 0.01
            tensors[name] = numbers.to(dtype)
        else:
            tensors[name] = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int64, device=device).to(dtype)
    codes = format.unpack_codes(tensors["codes"], shape[1])  # the bits after a row's end are 0
    params = format.unpack_params(tensors, shape)
    return format.pack(codes, params, shape)


def error_of(kernel: Triton, packed: dict[str, Tensor], x: Tensor) -> float:
    """Return |y - x W^^T| / |x W^^T|, W^ decoded and multiplied in fp64 a slice of rows at a time.

    Args:
        kernel: The kernel.
        packed: The packed tensors.
        x: Inputs (tokens, columns).
    """
    format, shape = kernel.spec.format, kernel.spec.shape
    weights = unpack(format, packed, shape).dequantize()
    y = kernel.apply(x).double()
    step = max(1, (1 << 26) // shape[1])
    expected = torch.cat([x.double() @ part.double().T for part in weights.split(step)], -1)
    return float((y - expected).norm() / expected.norm())


def median_time_s(calls: list[Callable[[], Any]]) -> float:
    """Return the seconds of one call: the median over replays of a CUDA graph of all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for repeat in range(REPEATS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def measured_bandwidth() -> float:
    """Return the GB/s of a copy on the device, bytes read and written."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / median_time_s([lambda: target.copy_(source)]) / 1e9


def copies_of(size: int) -> int:
    """Return the number of matrices of `size` bytes that exceed the cache."""
    return max(2, min(MAX_COPIES, -(-ROTATED_BYTES // size)))


def measure(
    name: str, format: Format, shape: tuple[int, int], tokens: int, device: torch.device
) -> dict[str, Any]:
    """Return one line of results: correctness, and on a GPU the times of the kernel."""
    x = torch.randn(tokens, shape[1], device=device).to(torch.bfloat16)
    packed = random_packed(format, shape, device)
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    spec = KernelSpec(format, shape, device)
    kernel = Triton(spec, packed)
    error = error_of(kernel, packed, x)
    line: dict[str, Any] = {"kernel": "triton", "format": name, "bits": format.rate, "shape": list(shape)}
    line |= {"tokens": tokens, "packed_bytes": size, "error": error, "right": error <= ALLOWED}
    if device.type == "cuda" and line["right"]:
        others = [{key: tensor.clone() for key, tensor in packed.items()} for _ in range(copies_of(size) - 1)]
        kernels = [kernel, *(Triton(spec, tensors) for tensors in others)]
        line["time_s"] = median_time_s([lambda k=k: k.apply(x) for k in kernels])
        line["GBps"] = size / line["time_s"] / 1e9
    return line


def torch_time_s(shape: tuple[int, int], tokens: int) -> float:
    """Return the seconds of F.linear in bf16, with weights that rotate over copies.

    Args:
        shape: (rows, columns).
        tokens: Number of tokens.
    """
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
    count = copies_of(2 * shape[0] * shape[1])
    weights = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    return median_time_s([lambda W=W: torch.nn.functional.linear(x, W) for W in weights])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--formats", nargs="+", default=FORMATS_MEASURED)
    parser.add_argument("--tokens", type=int, default=1)
    arguments = parser.parse_args()

    device = torch.device("cpu" if is_interpreted() else "cuda")
    reason = unsupported_reason(device)
    if reason is None and device.type == "cuda" and not torch.cuda.is_available():
        reason = "There is no GPU; TRITON_INTERPRET=1 checks the logic without one."
    if reason is not None:
        sys.exit(f"error: {reason}")
    torch.manual_seed(0)
    started = time.perf_counter()
    on_gpu = device.type == "cuda"
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "Triton's interpreter",
        "torch": torch.__version__,
        "bandwidth_GBps": measured_bandwidth() if on_gpu else None,
        "kernels": [],
    }
    for text in arguments.shapes:
        rows, columns = (int(part) for part in text.split("x"))
        torch_s = torch_time_s((rows, columns), arguments.tokens) if on_gpu else None
        for name in arguments.formats:
            for bits in arguments.bits:
                format = format_of(name, bits)
                if format is None:
                    continue
                line = measure(name, format, (rows, columns), arguments.tokens, device)
                if "time_s" in line:
                    line["fraction_of_bandwidth"] = line["GBps"] / report["bandwidth_GBps"]
                    line["torch_bf16_time_s"] = torch_s
                    line["speedup_vs_torch_bf16"] = torch_s / line["time_s"]
                report["kernels"].append(line)
    report["time_s"] = round(time.perf_counter() - started, 1)
    print(json.dumps(report))
    wrong = [line for line in report["kernels"] if not line["right"]]
    for line in wrong:
        print(f"wrong: {line['format']} {line['bits']} {line['shape']}: {line['error']:.2e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
