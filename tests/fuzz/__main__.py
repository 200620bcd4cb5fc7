"""Damage files one at a time and read them in every way: `make fuzz MINUTES=10 SEED=n`.

Every input runs in a process of its own, which this process forks. A use ends well where it refuses the file in
one sentence, or computes what it computes from the undamaged file. A failure is an internal error, a crash, a
hang, memory that grows, or, for files whose contents are recorded, another result that some loader gives. Failures
are kept in build/fuzz, and the figures are written to docs/fuzz.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuzz.corpus import READERS, Reader, Refused, build
from fuzz.mutations import mutate

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
HANG_S = 10  # of the processor
WAIT_S = 30  # of a clock, because other processes of a busy machine take their share
TIMERS = ((signal.ITIMER_PROF, signal.SIGPROF, HANG_S), (signal.ITIMER_REAL, signal.SIGALRM, WAIT_S))
HANGS = (signal.SIGPROF, signal.SIGALRM, signal.SIGKILL)
GROWTH_BYTES = 200 << 20
GOOD = ("refused", "identical", "read")
BAD = ("internal error", "crash", "hang", "memory", "other result")


@dataclass
class Figures:
    """Inputs by outcome, of one reader."""

    outcomes: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    most_bytes: int = 0


def copy(source: Path, target: Path) -> None:
    """Copy a folder."""
    shutil.copytree(source, target)


def memory(key: str) -> int:
    """Return a size of this process in bytes, by its name in /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return 0


def run_uses(reader: Reader, folder: Path) -> dict[str, tuple[str, str]]:
    """Return the outcome of every use of a folder and its digest, sentence or traceback."""
    results = {}
    for name, use in reader.uses.items():
        try:
            results[name] = ("read", use(folder))
        except Refused as error:
            results[name] = ("refused", str(error)[:300])
        except BaseException:
            results[name] = ("internal error", traceback.format_exc()[-1500:])
    return results


def judge(reader: Reader, results: dict[str, tuple[str, str]], sound: dict[str, str]) -> str:
    """Return the outcome of one input, from those of its uses."""
    kinds = [kind for kind, _ in results.values()]
    if "internal error" in kinds:
        return "internal error"
    if not reader.strict:
        return "read" if "read" in kinds else "refused"
    differs = any(kind == "read" and digest != sound[name] for name, (kind, digest) in results.items())
    if differs:
        return "other result"
    return "identical" if "read" in kinds else "refused"


class Child:
    """A forked process that damages one copy and reads it."""

    def __init__(self, reader: Reader, corpus: Path, folder: Path, seed: str) -> None:
        self.folder, self.started = folder, time.monotonic()
        receive, send = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(receive)
            _child(reader, corpus, folder, seed, send)
        os.close(send)
        self.pipe, self.data = receive, b""

    def poll(self) -> dict[str, Any] | None:
        """Return the report once the process has ended."""
        ready, _, _ = select.select([self.pipe], [], [], 0)
        if ready:
            piece = os.read(self.pipe, 1 << 16)
            self.data += piece
            if not piece:
                return self._end()
        if time.monotonic() - self.started > 10 * WAIT_S:  # not even its alarm ended it
            os.kill(self.pid, signal.SIGKILL)
            return self._end()
        return None

    def _end(self) -> dict[str, Any]:
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)
        report: dict[str, Any] = json.loads(self.data) if self.data.endswith(b"}") else {}
        report["time_s"] = time.monotonic() - self.started
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            report["died"] = "hang" if number in HANGS else "crash"
            report["signal"] = number
        return report


def _child(reader: Reader, corpus: Path, folder: Path, seed: str, send: int) -> None:
    """Damage, read, report, and exit."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    draw = random.Random(seed)
    copy(corpus / reader.root, folder)
    files = sorted(path for path in folder.glob(reader.pattern) if path.is_file())
    path = draw.choice(files)
    report: dict[str, Any] = {"file": str(path.relative_to(folder))}
    try:
        report["mutation"] = mutate(path, draw)
        if reader.adapt:
            reader.adapt(folder)
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            shutil.copy(path, BUILD / f"last-{os.getpid()}")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        for timer, signum, seconds in TIMERS:
            signal.signal(signum, signal.SIG_DFL)
            signal.setitimer(timer, seconds * len(reader.uses))
        report["uses"] = run_uses(reader, folder)
        report["growth"] = memory("VmHWM") - before
    except BaseException:
        report["uses"] = {"mutation": ("internal error", traceback.format_exc()[-1500:])}
    with os.fdopen(send, "wb") as pipe:
        pipe.write(json.dumps(report).encode())
    os._exit(0)


def baselines(corpus: Path, scratch: Path) -> dict[str, dict[str, str]]:
    """Return reader -> use -> digest of the undamaged files; every use must read them."""
    found = {}
    for name, reader in READERS.items():
        copy(corpus / reader.root, scratch / "sound")
        results = run_uses(reader, scratch / "sound")
        shutil.rmtree(scratch / "sound")
        unread = {use: result for use, result in results.items() if result[0] != "read"}
        assert not unread, (name, unread)
        found[name] = {use: digest for use, (_, digest) in results.items()}
    return found


def table(figures: dict[str, Figures], options: argparse.Namespace, minutes: float) -> str:
    """Return docs/fuzz.md."""
    total = sum(sum(f.outcomes.values()) for f in figures.values())
    bad = sum(f.outcomes[kind] for f in figures.values() for kind in BAD)
    rows = []
    for name, f in figures.items():
        counts = [f.outcomes[kind] for kind in ("refused", "identical", "read", *BAD)]
        row = [name, sum(f.outcomes.values()), *counts, f"{f.slowest_s:.1f}", f"{f.most_bytes / 1e6:.0f}"]
        rows.append("| " + " | ".join(map(str, row)) + " |")
    kinds: Counter[str] = sum((f.mutations for f in figures.values()), Counter())
    listed = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.most_common())
    columns = ["read as", "inputs", "refused", "identical", "read", *BAD, "slowest, s", "most memory, MB"]
    return f"""# Fuzzing

`make fuzz MINUTES={options.minutes:g} SEED={options.seed}` damaged {total:,} files in {minutes:.0f} minutes,
one at a time, and read each in every way: {bad:,} failures.

An input ends well where it is *refused* in one sentence by every use, where every use that goes on computes what
it computes from the undamaged file (*identical*), or, for files whose contents nothing records (a float model, a
text), where it is *read*. An *other result* is a changed file of a quantized folder that some loader accepts and
computes otherwise. A hang is {HANG_S} s of the processor a use, or {WAIT_S} s of a clock; memory may grow by
{GROWTH_BYTES >> 20} MiB.

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{chr(10).join(rows)}

Mutations: {listed}.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "fuzz.md")
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        scratch = Path(temporary)
        build(scratch / "corpus")
        sound = baselines(scratch / "corpus", scratch)
        os.chdir(scratch)
        figures = fuzz(options, scratch, sound)
    total = sum(sum(f.outcomes.values()) for f in figures.values())
    failures = sum(f.outcomes[kind] for f in figures.values() for kind in BAD)
    options.output.write_text(table(figures, options, options.minutes), encoding="utf-8")
    print(f"{total:,} inputs, {failures:,} failures; {options.output}")
    return int(failures > 0)


def fuzz(options: argparse.Namespace, scratch: Path, sound: dict[str, dict[str, str]]) -> dict[str, Figures]:
    """Run inputs until the time is over; returns the figures by reader."""
    figures = {name: Figures() for name in options.readers}
    running: dict[int, tuple[str, Child]] = {}
    end, number = time.monotonic() + 60 * options.minutes, 0
    while running or time.monotonic() < end:
        while len(running) < options.jobs and time.monotonic() < end:
            name = options.readers[number % len(options.readers)]
            folder = scratch / f"input-{number}"
            running[number] = name, Child(READERS[name], scratch / "corpus", folder, f"{options.seed}-{number}")
            number += 1
        for key, (name, child) in list(running.items()):
            if (report := child.poll()) is not None:
                del running[key]
                record(figures[name], name, key, child.pid, report, sound[name], options)
        time.sleep(0.002)
    return figures


def record(
    figures: Figures, name: str, number: int, pid: int, report: dict[str, Any], sound: dict[str, str], options: Any
) -> None:
    """Count one input, and keep it where it failed."""
    kept = BUILD / f"last-{pid}"
    if "uses" in report:
        outcome = judge(READERS[name], {k: tuple(v) for k, v in report["uses"].items()}, sound)
    else:
        outcome = report.get("died", "crash")
    if outcome in GOOD and report.get("growth", 0) > GROWTH_BYTES:
        outcome = "memory"
    figures.outcomes[outcome] += 1
    figures.mutations[report.get("mutation", "unknown")] += 1
    figures.slowest_s = max(figures.slowest_s, report["time_s"])
    figures.most_bytes = max(figures.most_bytes, report.get("growth", 0))
    if outcome in BAD:
        label = f"{name.replace(' ', '-')}-{options.seed}-{number}"
        (BUILD / f"{label}.json").write_text(json.dumps({"outcome": outcome, **report}, indent=1))
        if kept.exists():
            kept.rename(BUILD / f"{label}.bin")
        print(f"{outcome}: {label} ({report.get('file')}, {report.get('mutation')})", flush=True)
    kept.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
