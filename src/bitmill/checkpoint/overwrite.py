"""Give a finished folder its place: a new one, or that of an earlier folder which bitmill wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitmill.checkpoint.reader import is_bitmill_folder, open_checkpoint
from bitmill.checkpoint.work_folder import WorkFolder, check_new, check_no_run, check_place
from bitmill.errors import CheckpointError, OutputError, SourceError, one_line
from bitmill.files import publish, replace_folder


def check_output(out: Path, overwrite: bool) -> None:
    """Check that a run may write a folder.

    Args:
        out: the folder.
        overwrite: it may exist if bitmill wrote all of it.

    Raises:
        OutputError: it may not be written, is being made, or was made in part by a run that can be resumed.
    """
    if overwrite and os.path.lexists(out):
        check_replaceable(out)
        check_no_run(out)
    else:
        check_new(out)


def check_replaceable(out: Path) -> None:
    """Raise OutputError unless everything in a folder was written by bitmill, and another can take its place."""
    choice = "remove it yourself, or choose another folder with -o"
    if out.is_symlink():
        raise OutputError(f"{out} is a link, which --overwrite does not replace; name the folder itself.")
    if not is_bitmill_folder(out):
        raise OutputError(f"{out} was not written by bitmill, so --overwrite does not delete it; {choice}.")
    try:
        foreign = open_checkpoint(out).foreign
    except (CheckpointError, SourceError) as error:
        raise OutputError(
            f"{out} does not hold what bitmill wrote ({one_line(error)}), so --overwrite does not delete it; "
            f"{choice}."
        ) from None
    if foreign:
        raise OutputError(
            f"{out} holds {foreign[0]}, which bitmill did not write, so --overwrite does not delete it; {choice}."
        )
    check_place(out)


def check_new_folder(out: Path, overwrite: bool, resume: bool) -> None:
    """Raise OutputError unless `new_folder` may begin, or go on, to write a folder."""
    if resume and overwrite and os.path.lexists(out):
        check_replaceable(out)
    elif not resume or os.path.lexists(out):
        check_output(out, overwrite)


@contextmanager
def new_folder(out: Path, overwrite: bool, resume: bool = False) -> Iterator[WorkFolder]:
    """Yield a work folder, whose `model` becomes `out` when the block ends without an error.

    After an error the work folder is kept if it has a journal, with which the run can be resumed.

    Args:
        out: the folder.
        overwrite: replace a folder that bitmill wrote.
        resume: keep what an earlier run left in the work folder.

    Raises:
        OutputError: the folder cannot be written, or another process is writing it.
    """
    check_new_folder(out, overwrite, resume)
    work = WorkFolder(out)
    try:
        if not resume:
            work.clear()
        yield work
        publish_work(work, overwrite)
    finally:
        work.close()


def publish_work(work: WorkFolder, overwrite: bool) -> None:
    """Let the finished folder of a work folder become `work.out`, by one rename, and remove the work folder.

    Args:
        work: the work folder.
        overwrite: replace a folder that bitmill wrote.

    Raises:
        OutputError: the folder has been written meanwhile, or cannot be written.
    """
    if overwrite and os.path.lexists(work.out):
        check_replaceable(work.out)  # again: hours may have passed
        replace_folder(work.model, work.out)
    else:
        publish(work.model, work.out)
    work.remove()
