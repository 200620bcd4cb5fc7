"""Test every Triton kernel on this machine's GPU, and time each against torch: `make test-gpu`.

The tests are those that `make test` runs in Triton's interpreter. Times are those of benchmarks/gpu_kernels.py at
one token: bytes of the packed weights a second, as a share of what a copy on the device reads and writes, and
torch's time in bf16 over the kernel's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bitmill.runtime.triton.available import unsupported_reason

LIMIT = 290  # seconds, for tests and times together
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "runtime" / "triton"
TESTS = (
    "-m",
    "pytest",
    "-q",
    "-x",
    "-p",
    "no:cacheprovider",
    *(str(FOLDER / f"triton_{n}.py") for n in ("kernels", "kv")),
)
TIMES = (str(ROOT / "benchmarks" / "gpu_kernels.py"), "--shapes", "4096x4096", "4096x11008", "--bits", "4", "2")


def missing() -> str | None:
    """Return one sentence on why nothing can run here, or None."""
    if not torch.cuda.is_available():
        return "There is no GPU that torch can use here, so no Triton kernel was tested or timed."
    return unsupported_reason(torch.device("cuda"))


def table(report: dict[str, Any]) -> list[str]:
    """Return the lines of a table of the times, with the name of the GPU."""
    lines = [f"{report['device']}, torch {report['torch']}, {report['bandwidth_GBps']:.0f} GB/s"]
    for line in report["kernels"]:
        name = f"{line['format']} {line['bits']:g} bits {'x'.join(map(str, line['shape']))}"
        times = "WRONG"
        if line["right"]:
            times = (
                f"{line['fraction_of_bandwidth']:4.0%} of bandwidth, {line['speedup_vs_torch_bf16']:.1f} x torch"
            )
        lines.append(f"{name:36} {times}")
    return lines


def main() -> int:
    """Run the tests and then the times; return the exit status."""
    reason = missing()
    if reason is not None:
        print(reason)
        return 0
    started = time.monotonic()
    try:
        tests = subprocess.run([sys.executable, *TESTS], check=False, timeout=LIMIT)
        left = LIMIT - (time.monotonic() - started)
        times = subprocess.run(
            [sys.executable, *TIMES], check=False, timeout=left, stdout=subprocess.PIPE, text=True
        )
    except subprocess.TimeoutExpired:
        print(f"The tests and times on the GPU took more than {LIMIT} s and were ended.")
        return 1
    if times.stdout:
        print("\n".join(table(json.loads(times.stdout))))
    return tests.returncode or times.returncode


if __name__ == "__main__":
    sys.exit(main())
