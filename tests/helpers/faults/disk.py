"""The disk is full or refuses, the output folder is there already."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.faults import Faults
from helpers.workspace import World

fault = Faults()


def fails_with(code: int) -> Callable[..., None]:
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@fault
def disk_full_at_a_shard(world: World, patch: pytest.MonkeyPatch):
    patch.setattr("bitmill.checkpoint.files.save_file", fails_with(errno.ENOSPC))
    return world.quantize(), ["disk is full", "out.partial/model"]


def full_at(kind: Callable[[int], bool], patch: pytest.MonkeyPatch) -> None:
    """Fail to flush files of one kind, given by a test of their mode."""
    flush = os.fsync

    def fail(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            fails_with(errno.ENOSPC)()
        flush(descriptor)

    patch.setattr("bitmill.checkpoint.files.os.fsync", fail)


@fault
def disk_full_at_the_journal(world, patch):
    full_at(stat.S_ISREG, patch)
    return world.quantize(), ["disk is full", "journal.json"]


@fault
def disk_full_at_the_work_folder(world, patch):
    full_at(stat.S_ISDIR, patch)
    return world.quantize(), ["disk is full", world.out]


@fault
def disk_full_at_the_tokenizer(world, patch):
    patch.setattr("bitmill.sources.hf.shutil.copyfile", fails_with(errno.ENOSPC))
    return world.quantize(), ["No space left", "out.partial/model/"]


@fault
def disk_too_small_from_the_start(world, patch):
    patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    return world.quantize(), ["0 MB free", world.root]


@fault
def folder_not_writable(world, patch):
    patch.setattr("os.mkdir", fails_with(errno.EACCES))
    return world.quantize(), ["not writable", world.out]


@fault
def file_system_read_only_at_the_lock(world, patch):
    opened = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if self.name == "lock" and "w" in mode and not self.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(self, mode, *args, **kwargs)

    patch.setattr(Path, "open", refuse)
    return world.quantize(), ["not writable", "out.partial"]


@fault
def file_where_a_folder_is_needed(world, patch):
    return world.quantize(out=world.text / "out"), ["a part of the path is a file", world.text]


@fault
def output_exists(world, patch):
    return world.quantize(out=world.done), ["exists already", world.done]


@fault
def output_is_another_folder(world, patch):
    return world.quantize("--resume", out=world.source), ["no finished bitmill folder", world.source]


@fault
def no_output(world, patch):
    return ["quantize", str(world.source), "--method", "rtn"], ["-o"]


@fault
def output_in_use(world, patch):
    import fcntl

    held = (world.partial / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    patch.setattr(world, "held", held, raising=False)
    return world.quantize("--resume", out=world.half), ["Another process", world.partial]
