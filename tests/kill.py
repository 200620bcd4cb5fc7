"""Kill commands at random moments, let them go on, and compare the bytes of what they write.

    make kill SEED=3         or  python tests/kill.py --seed 3 --moments 200

A command runs in a fork of a process that has done the imports, is killed (SIGKILL) at a time drawn by the seed,
one in three is killed once more while it goes on, and then it runs to its end. New folders must be those of an
undisturbed run, byte for byte; a finished folder that is changed must at every kill be as it was or as it is to
become. The table counts the kills that met a living process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"BITMILL_KERNEL": "reference", "HF_HUB_OFFLINE": "1"}

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - what a child need not import

import bitmill.api  # noqa: F401
from bitmill.cli.main import main as bitmill_command
from bitmill.workflows.comparison import run as comparison
from helpers.comparisons import command as compare_command
from helpers.comparisons import in_this_process
from helpers.workspace import Workspace, arguments, save_model, snapshot, write_text

BLOCKS = 2
LATEST = 1.05  # of the time that an undisturbed run takes
_TIMED = ("quantize_time_s", "peak_memory_bytes")


@dataclass(frozen=True)
class Job:
    """A command that is killed.

    Attributes:
        name: for the table.
        words: workspace -> the command.
        folder: what it writes, below the workspace.
        again: words that are added to go on.
        in_place: it changes a finished folder.
    """

    name: str
    words: Callable[[Workspace], list[str]]
    folder: str
    again: tuple[str, ...] = ()
    in_place: bool = False


def _quantize(method: str, *more: str) -> Callable[[Workspace], list[str]]:
    return lambda place: arguments(Path("source"), "text.txt", Path("out"), "--bits", "4", *more, method=method)


def _calibrate(place: Workspace) -> list[str]:
    windows = ["--kv-samples", "2", "--kv-seqlen", "40", "--calib", "text.txt"]
    return ["quantize", "done", "--method", "none", "--kv", "kvquant", "--kv-bits", "3", *windows]


def _record(place: Workspace) -> list[str]:
    windows = ["--text", "text.txt", "--seqlen", "32", "--windows", "2"]
    return ["eval", "done", *windows, "--reference", "source", "--record"]


def _compare(place: Workspace) -> list[str]:
    return compare_command(place, "--keep-models", bits="4")


def _train(place: Workspace) -> list[str]:
    windows = ["--calib", "text.txt", "--samples", "16", "--seqlen", "24", "--held-apart", "2", "--tokens", "48"]
    method = ["--method", "efficientqat", "--bits", "2", "--group-size", "32", "--set", "epochs=1"]
    return ["train", "source", *method, "--loss", "next-token", "--learn", "scales", *windows, "-o", "out"]


JOBS = (
    Job("quantize, rtn", _quantize("rtn"), "out", ("--resume",)),
    Job("quantize, gptq", _quantize("gptq", "--head-bits", "8"), "out", ("--resume",)),
    Job("quantize, omniquant", _quantize("omniquant", "--set", "epochs=1"), "out", ("--resume",)),
    Job("train, efficientqat", _train, "out", ("--resume",)),
    Job("compare", _compare, "grid"),
    Job("calibrate keys and values in place", _calibrate, "done", in_place=True),
    Job("eval --record", _record, "done", in_place=True),
)


def start(words: list[str], place: Path) -> int:
    """Run a command in a fork of this process; return the id of the fork."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(place)
        for descriptor in (1, 2):
            os.dup2(os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        torch.set_num_threads(1)
        os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote
        comparison.run_grid.__kwdefaults__["run"] = in_this_process
        status = bitmill_command(words)
    finally:
        os._exit(status)


def end(child: int) -> int:
    """Wait for a fork and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(delay_s: float, words: list[str], place: Path) -> bool:
    """Run a command and kill it; False where it ended before."""
    child = start(words, place)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    return end(child) == -signal.SIGKILL


def written(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name, those of a comparison without its page, times and memory."""
    files = snapshot(folder) if folder.exists() else {}
    if "results.json" not in files:
        return files
    names = [name for name in files if name not in ("lock", "report.html")]
    return {name: _timeless(files[name]) if name.endswith(".json") else files[name] for name in names}


def _timeless(data: bytes) -> bytes:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(part) for key, part in value.items() if key not in _TIMED}
        return [clean(part) for part in value] if isinstance(value, list) else value

    return json.dumps(clean(json.loads(data))).encode()


class Killing:
    """A job in a workspace of its own, and what it writes undisturbed."""

    def __init__(self, job: Job, base: Path, root: Path) -> None:
        self.job, self.base, self.root = job, base, root
        place = self.place("undisturbed")
        self.before = written(place / job.folder)
        self.words = job.words(Workspace(place))
        started = time.monotonic()
        status = end(start(self.words, place))
        assert status == 0, (place / "log").read_text()
        self.took_s = time.monotonic() - started
        self.after = written(place / job.folder)

    def place(self, name: str) -> Path:
        return Path(shutil.copytree(self.base, self.root / name))

    def kill(self, draw: random.Random) -> int:
        """Kill the job at a moment, and perhaps again; return how many kills met a living process."""
        place = self.place("place")
        words, met = self.words, 0
        for _ in range(1 + (draw.random() < 1 / 3)):
            if not killed_after(draw.random() * self.took_s * LATEST, words, place):
                break
            met += 1
            self.check_killed(place)
            words = [*self.words, *self.job.again]
        if met:
            assert end(start(words, place)) == 0, (place / "log").read_text()
        self.check_finished(place)
        shutil.rmtree(place)
        return met

    def check_killed(self, place: Path) -> None:
        if self.job.in_place:
            assert written(place / self.job.folder) in (self.before, self.after), "a mixture of old and new"
        elif self.job.folder == "out":
            assert written(place / "out") in ({}, self.after), "a folder that is not complete"

    def check_finished(self, place: Path) -> None:
        found = written(place / self.job.folder)
        differing = [name for name in {*found, *self.after} if found.get(name) != self.after.get(name)]
        assert not differing, f"other bytes: {', '.join(sorted(differing))}"
        assert not list(place.rglob("*.partial")), "a work folder remains"


def build(base: Path) -> Path:
    """Make a workspace: a float model, a text, and a quantized folder."""
    save_model(base / "source", blocks=BLOCKS)
    write_text(base / "text.txt")
    words = arguments(Path("source"), "text.txt", Path("done"), "--measure", "0", method="rtn")
    assert end(start(words, base)) == 0, (base / "log").read_text()
    (base / "log").unlink()
    return base


def run(jobs: Sequence[Job], moments: int, seed: int, say: Callable[[str], object] = print) -> dict[str, int]:
    """Kill every job in turn until the kills are `moments`; return the number of each job.

    Raises:
        AssertionError: a job did not leave what it should.
    """
    counts = dict.fromkeys((job.name for job in jobs), 0)
    with tempfile.TemporaryDirectory(prefix="bitmill-kill-") as temporary:
        root = Path(temporary)
        base = build(root / "base")
        draw = random.Random(seed)
        killings = [Killing(job, base, root / str(number)) for number, job in enumerate(jobs)]
        while sum(counts.values()) < moments:
            for killing in killings:
                if sum(counts.values()) >= moments:
                    break
                counts[killing.job.name] += killing.kill(draw)
                say(f"{sum(counts.values())} of {moments}")
    return counts


def main() -> None:
    """Print a table of the kills of every job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--job", choices=[job.name for job in JOBS], help="this one alone")
    given = parser.parse_args()
    started = time.monotonic()
    jobs = [job for job in JOBS if given.job in (None, job.name)]
    counts = run(jobs, given.moments, given.seed, lambda line: print(line, end="\r", file=sys.stderr, flush=True))
    for name, count in counts.items():
        print(f"{name:36} killed {count:4} times")
    total, took_s = sum(counts.values()), time.monotonic() - started
    print(f"{'all':36} killed {total:4} times, seed {given.seed}, {took_s:.0f} s: same bytes, or the old folder")


if __name__ == "__main__":
    main()
