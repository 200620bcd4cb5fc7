"""The disk is full or refuses, the output folder is there already."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from helpers.faults import Faults
from helpers.workspace import Workspace

fault = Faults()


def fails_with(code: int) -> Callable[..., None]:
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@fault
def disk_full_at_a_shard(workspace: Workspace, patch: pytest.MonkeyPatch):
    patch.setattr("bitmill.files.save_file", fails_with(errno.ENOSPC))
    return workspace.quantize(), ["disk is full", "out.partial/model"]


def full_at(kind: Callable[[int], bool], patch: pytest.MonkeyPatch) -> None:
    """Fail to flush files of one kind, given by a test of their mode."""
    flush = os.fsync

    def fail(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            fails_with(errno.ENOSPC)()
        flush(descriptor)

    patch.setattr("bitmill.files.os.fsync", fail)


@fault
def disk_full_at_a_flush(workspace, patch):
    full_at(stat.S_ISREG, patch)
    return workspace.quantize(), ["disk is full", "out.partial"]


@fault
def disk_full_at_the_work_folder(workspace, patch):
    full_at(stat.S_ISDIR, patch)
    return workspace.quantize(), ["disk is full", workspace.out]


@fault
def disk_full_at_the_tokenizer(workspace, patch):
    patch.setattr("bitmill.sources.hf.shutil.copyfile", fails_with(errno.ENOSPC))
    return workspace.quantize(), ["No space left", "out.partial/model/"]


@fault
def disk_too_small_from_the_start(workspace, patch):
    patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    return workspace.quantize(), ["0 MB free", workspace.root]


@fault
def folder_not_writable(workspace, patch):
    patch.setattr("os.mkdir", fails_with(errno.EACCES))
    return workspace.quantize(), ["not writable", workspace.out]


@fault
def file_system_read_only_at_the_lock(workspace, patch):
    opened = os.open

    def refuse(path, flags, *args, **kwargs):
        if str(path).endswith("/lock") and flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *args, **kwargs)

    patch.setattr(os, "open", refuse)
    return workspace.quantize(), ["not writable", "out.partial"]


@fault
def file_where_a_folder_is_needed(workspace, patch):
    return workspace.quantize(out=workspace.text / "out"), ["a part of the path is a file", workspace.text]


@fault
def output_exists(workspace, patch):
    return workspace.quantize(out=workspace.done), ["exists already", workspace.done]


@fault
def output_is_another_folder(workspace, patch):
    return workspace.quantize("--resume", out=workspace.source), ["no finished bitmill folder", workspace.source]


@fault
def output_in_use(workspace, patch):
    import fcntl

    held = (workspace.partial / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    patch.setattr(workspace, "held", held, raising=False)
    return workspace.quantize("--resume", out=workspace.half), ["Another process", workspace.partial]
