"""Decoding before and after: kernels of one token, and whole models, of an earlier commit and this one in turns.

    git worktree add ../before COMMIT && make -C ../before setup
    python benchmarks/decode_before.py ../before/.venv/bin/python     # let the machine do nothing else
    python benchmarks/decode_before.py ../before/.venv/bin/python FOLDER ... --rounds 5 > decode_before.json

Both programs run `bitmill bench kernels` and, with folders, `bitmill bench decode`, one after the other, in
another order every round. A case is slower if its time over that of before is above the limit in the median of
the rounds, and above 1 in all of them; then the exit status is 1. Cases that only one commit has are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

Times = dict[str, float]  # case -> seconds


def main() -> None:
    """Print the ratios of all rounds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the Python of an environment with the earlier commit")
    parser.add_argument("folders", nargs="*", help="quantized models that both commits load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=5, help="measurements of a kernel in a round")
    parser.add_argument("--shape", default="4096x4096", help="OUTxIN of the layer")
    parser.add_argument("--format", action="append", default=[], help="only this format; repeatable")
    parser.add_argument("--limit", type=float, default=1.05, help="ratio from which on a case is slower")
    given = parser.parse_args()
    programs = {"before": str(given.before), "after": sys.executable}
    rounds: list[dict[str, Times]] = []
    for number in range(given.rounds):
        order = list(programs) if number % 2 == 0 else list(programs)[::-1]
        rounds.append({name: measured(programs[name], given) for name in order})
        print(f"round {number + 1}: {geometric_mean(ratios(rounds[-1:])):.3f} of before", file=sys.stderr)
    found = ratios(rounds)
    slower = slower_cases(found, given.limit)
    result = {"rounds": rounds, "ratios": {case: median(each) for case, each in found.items()}, "slower": slower}
    print(json.dumps({**result, "geometric_mean": geometric_mean(found)}, indent=1))
    sys.exit(bool(slower))


def measured(python: str, given: argparse.Namespace) -> Times:
    """Return the seconds of every kernel, and of a token of every folder."""
    formats = [part for name in given.format for part in ("--format", name)]
    kernels = bench(python, "kernels", "--shape", given.shape, "--turns", str(given.turns), *formats)["kernels"]
    times = {f"{one['format']} {one['bits']} {one['group_size']}": one["time_s"] for one in kernels}
    for folder in given.folders:
        times[Path(folder).name] = 1 / bench(python, "decode", folder)["tokens_per_s"]
    return times


def bench(python: str, *arguments: str) -> dict[str, Any]:
    """Return what `bitmill bench` prints. Exits where it fails."""
    command = [python, "-P", "-m", "bitmill", "bench", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}.")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ratios(rounds: Sequence[dict[str, Times]]) -> dict[str, list[float]]:
    """Return case -> its time after over that before, round by round."""
    cases = [case for case in rounds[0]["after"] if case in rounds[0]["before"]]
    return {case: [one["after"][case] / one["before"][case] for one in rounds] for case in cases}


def slower_cases(found: dict[str, list[float]], limit: float) -> list[str]:
    """Return the cases that are slower, see the top of the file."""
    return [case for case, each in found.items() if median(each) > limit and min(each) > 1]


def geometric_mean(found: dict[str, list[float]]) -> float:
    """Return the geometric mean of all ratios."""
    logs = [math.log(ratio) for each in found.values() for ratio in each]
    return math.exp(sum(logs) / len(logs))


if __name__ == "__main__":
    main()
