"""A run that is killed at any moment and resumed writes the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from helpers.selection import thin
from helpers.workspace import arguments, save_model, snapshot, write_text

BLOCKS = 4
# Each file appears by os.replace: the journal, then per block a shard and the journal, then the rest.
LAST = 1 + 2 * BLOCKS + 7


def quantize(folder: str, resume: bool, call: str = "", count: int = 0, after: bool = False) -> None:
    """In a process of its own: quantize; die at the `count`-th `call`, before or after it does its work."""
    import torch

    from bitmill.cli.main import main

    torch.set_num_threads(1)
    os.chdir(folder)
    if call:
        _die_at(call, count, after)
    os._exit(main(arguments(Path("source"), "text.txt", Path("out"), *["--resume"] * resume)))


def _die_at(call: str, count: int, after: bool) -> None:
    name = call.removeprefix("os.")
    real, calls = getattr(os, name), 0

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, counting)


@pytest.fixture(scope="module")
def start():
    """Start `quantize` in a fork of a process that has done its imports, which take much longer than the run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitmill.api", "bitmill.cli.main", "transformers.models.llama.modeling_llama"])

    def start(*args: object) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=quantize, args=args)
        process.start()
        return process

    return start


def finish(process) -> int:
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """(folder with the inputs, what the result must be, seconds it took)."""
    root = tmp_path_factory.mktemp("resume")
    save_model(root / "source", blocks=BLOCKS)
    write_text(root / "text.txt")
    started = time.monotonic()
    assert finish(start(str(root), False)) == 0
    took = time.monotonic() - started
    expected = snapshot(root / "out")
    shutil.rmtree(root / "out")
    return root, expected, took


@pytest.fixture
def place(undisturbed, tmp_path) -> Path:
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def journal_blocks(place: Path) -> int:
    try:
        return len(json.loads((place / "out.partial" / "journal.json").read_text())["blocks"])
    except FileNotFoundError:
        return 0


def check_resumed(place: Path, expected: dict[str, bytes], start) -> None:
    assert finish(start(str(place), True)) == 0
    assert snapshot(place / "out") == expected
    assert not (place / "out.partial").exists()


# (call, which, before or after it, blocks then in the journal)
MOMENTS = {
    "before the first journal": ("os.replace", 1, False, 0),
    "after the first journal": ("os.replace", 1, True, 0),
    "block 1 written and not named": ("os.replace", 2, False, 0),
    "block 1 named and not noted": ("os.replace", 2, True, 0),
    "block 1 noted": ("os.replace", 3, True, 1),
    "block 2 written and not named": ("os.replace", 4, False, 1),
    "block 3 noted": ("os.replace", 7, True, 3),
    "block 4 named and not noted": ("os.replace", 8, True, 3),
    "every block noted": ("os.replace", 9, True, 4),
    "the rest written and not named": ("os.replace", 10, False, 4),
    "the index written": ("os.replace", 11, True, 4),
    "the report not named": ("os.replace", LAST, False, 4),
    "the folder not named": ("os.rename", 1, False, 4),
    "the folder named": ("os.rename", 1, True, 4),
}


BRIEF = thin(MOMENTS, [name for number, name in enumerate(MOMENTS) if number % 2 == 0])


@pytest.mark.parametrize("moment", [MOMENTS[name] for name in BRIEF], ids=BRIEF)
def test_killed(moment, place, undisturbed, start):
    *when, blocks = moment
    assert finish(start(str(place), False, *when)) == -signal.SIGKILL
    assert journal_blocks(place) == blocks
    assert (place / "out").exists() == (when == ["os.rename", 1, True])
    check_resumed(place, undisturbed[1], start)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_killed_after_delay(share, place, undisturbed, start):
    process = start(str(place), False)
    time.sleep(share * undisturbed[2])
    process.kill()
    finish(process)
    check_resumed(place, undisturbed[1], start)


def test_killed_repeatedly(place, undisturbed, start):
    assert finish(start(str(place), False, "os.replace", 4, True)) == -signal.SIGKILL
    for _ in range(2):  # a resumed run writes no first journal, so this is one more block each time
        assert finish(start(str(place), True, "os.replace", 3, False)) == -signal.SIGKILL
    check_resumed(place, undisturbed[1], start)
