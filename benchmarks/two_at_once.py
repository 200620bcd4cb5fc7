"""Time of two `bitmill quantize` runs at once, in units of the time of one alone.

Each run is the command line in a process of its own with all cores. One alone and two at once take turns, so that
other work on the machine touches both; the medians count. All runs must write equal weights.

    python benchmarks/two_at_once.py                        # SmolLM2-135M by gptq; minutes on an idle machine
    python benchmarks/two_at_once.py --method rtn --rounds 5
    GOMP_SPINCOUNT=300000 python benchmarks/two_at_once.py  # libgomp's own setting, to compare with
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitmill.openmp import WAITING

BOUND = 2.2


def start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """Start one run that writes the folder `out`."""
    command = [sys.executable, "-P", "-m", "bitmill.cli.main", "quantize", arguments.model, "-o", str(out)]
    options = {
        "--method": arguments.method,
        "--samples": arguments.samples,
        "--seqlen": arguments.seqlen,
        "--measure": 0,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return subprocess.Popen([*command, *words, "--json"], stdout=subprocess.DEVNULL)


def time_runs(arguments: argparse.Namespace, outs: list[Path]) -> list[float]:
    """Run as many processes at once as there are folders to write; returns the seconds of each."""
    started = time.perf_counter()
    running = {start(arguments, out): out for out in outs}
    seconds = []
    while running:
        for process in [process for process in running if process.poll() is not None]:
            if process.returncode:
                raise SystemExit(f"A run ended with status {process.returncode}.")
            seconds.append(time.perf_counter() - started)
            del running[process]
        time.sleep(0.05)
    return seconds


def digest(folder: Path) -> str:
    """Return a digest of the weights in a folder."""
    total = hashlib.sha256()
    for shard in sorted(folder.glob("model-*.safetensors")):
        total.update(shard.read_bytes())
    return total.hexdigest()


def main() -> int:
    """Measure, print, and return 1 where two at once take too long or weights differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    alone: list[float] = []
    together: list[float] = []
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            outs = [Path(folder) / f"{number}-{name}" for name in ("alone", "first", "second")]
            alone += time_runs(arguments, outs[:1])
            together += time_runs(arguments, outs[1:])
            digests |= {digest(out) for out in outs}
            print(
                f"round {number + 1}: alone {alone[-1]:.1f} s, at once {together[-2]:.1f} and {together[-1]:.1f} s"
            )
    slower = statistics.median(together[1::2])  # of each pair, the run that ended last
    ratio = slower / statistics.median(alone)
    settings = {name: os.environ[name] for name in WAITING if name in os.environ}
    print(
        json.dumps(
            {"method": arguments.method, "alone_s": alone, "at_once_s": together, "ratio": ratio, **settings}
        )
    )
    if len(digests) > 1:
        print("The runs wrote different weights.")
        return 1
    print(f"Two at once take {ratio:.2f} times as long as one alone (bound {BOUND}).")
    return int(ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())
