"""Run work that writes files and stop it after one of its steps: killed, interrupted, or on a full disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from bitmill import files

STEPS = [(os, name) for name in ("replace", "rename", "fsync", "unlink", "link", "mkdir", "rmdir")]
STEPS.append((files, "_exchange"))


class Stop:
    """Counts steps and acts at one of them."""

    def __init__(self, moment: int, act: Callable[[], None]) -> None:
        self.moment, self.act, self.steps = moment, act, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.moment:
            self.act()

    @property
    def reached(self) -> bool:
        return self.steps >= self.moment


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def stopped_at(moment: int, act: Callable[[], None]):
    """Count the steps of the block, and act right after the one with this number (from 1)."""
    stop = Stop(moment, act)

    def after(call):
        def counted(*args, **kwargs):
            result = call(*args, **kwargs)
            stop.step()
            return result

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for module, name in STEPS:
            patch.setattr(module, name, after(getattr(module, name)))
        yield stop


def in_child(work: Callable[[], object]) -> int:
    """Do work in a fork of this process; return its exit status, negative for a signal, 1 for an exception."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        result = work()
        status = result if isinstance(result, int) else 0
    finally:
        os._exit(status)


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """Do work in a child that is killed after a step; returns False where it has fewer steps and ended well."""

    def limited():
        with stopped_at(moment, kill):
            return work()

    status = in_child(limited)
    assert status in (0, -signal.SIGKILL), status
    return status != 0
