"""The work folder `OUT.partial`, in which one process at a time makes or changes the folder OUT.

Its `lock` is locked while a process works, and holds its process id. The system unlocks it when the process
ends, also when it is killed. `model` is the folder to be: it becomes OUT, or takes its place, by one rename.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitmill.config.paths import user_path
from bitmill.errors import CheckpointError, OutputError
from bitmill.files import NO_HARD_LINKS, make_folder, output_errors, previous_folder, replace_folder

PARTIAL = ".partial"
SUFFIX_BYTES = len(PARTIAL)
LOCK = "lock"
JOURNAL = "journal.json"
MODEL = "model"
_POLL_S = 0.05
_START_S = 2.0  # another process may only look whether the folder is locked, or be about to end
_CHANGE_S = 60.0  # of another process that changes a finished folder, which takes a fraction of a second


class FolderLock:
    """Locks a folder for this process.

    Args:
        folder: the folder, which is made if it is missing.
        wait_s: seconds to wait for another process.

    Raises:
        OutputError: another process holds the lock, or its file cannot be opened.
    """

    def __init__(self, folder: Path, wait_s: float = _START_S) -> None:
        self.folder = folder
        limit = time.monotonic() + wait_s
        while not self._try():
            if time.monotonic() > limit:
                raise OutputError(
                    f"Another process{_holder(folder)} is writing {folder}; wait for it, or choose another folder."
                )
            time.sleep(_POLL_S)

    def _try(self) -> bool:
        """Lock the folder; False where another process holds it."""
        path = self.folder / LOCK
        with output_errors(path):
            try:
                make_folder(self.folder)
                descriptor = _open_lock(path)
            except FileNotFoundError:  # the process before has just removed it
                return False
        try:
            with output_errors(path):  # some file systems have no locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    return False
            if not _is_at(descriptor, path):  # the process before has removed it
                os.close(descriptor)
                return False
            with output_errors(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    @property
    def held(self) -> bool:
        """True until the folder is unlocked."""
        return self._descriptor >= 0

    def close(self) -> None:
        """Unlock the folder; again does nothing."""
        if self.held:
            os.close(self._descriptor)
            self._descriptor = -1


class WorkFolder:
    """The locked work folder of a folder to make or to change.

    Args:
        out: the folder.
        wait_s: seconds to wait for another process.

    Attributes:
        path: the work folder.
        model: the folder that becomes `out`.

    Raises:
        OutputError: another process is writing `out`, or the work folder belongs to somebody else.
    """

    def __init__(self, out: Path, wait_s: float = _START_S) -> None:
        self.out, self.path = out, partial_folder(out)
        self.model = self.path / MODEL
        if self.path.is_symlink() or (self.path.is_dir() and not is_work_folder(self.path)):
            raise OutputError(f"{self.path} is no work folder of bitmill; move it away, or choose another folder.")
        self._lock = FolderLock(self.path, wait_s)
        try:
            self._restore()
        except BaseException:
            self._lock.close()
            raise

    def _restore(self) -> None:
        """Give a folder its name back, where a process ended between the two renames of `replace_folder`."""
        previous = previous_folder(self.model)
        if previous.exists() and not self.out.exists():
            with output_errors(self.out):
                os.rename(previous, self.out)

    @property
    def unfinished(self) -> bool:
        """True where a run can be resumed."""
        return (self.path / JOURNAL).exists()

    def clear(self) -> None:
        """Remove everything that an earlier process left, but for the lock."""
        with output_errors(self.path):
            for entry in self.path.iterdir():
                if entry.name != LOCK:
                    remove(entry)

    def remove(self) -> None:
        """Remove the work folder, last the lock, which keeps others out until then."""
        if not self._lock.held:
            return
        try:
            self.clear()
            (self.path / LOCK).unlink()
            self.path.rmdir()
        except (OSError, OutputError):
            pass  # it is in nobody's way: no run in it can be resumed
        finally:
            self._lock.close()

    def close(self) -> None:
        """Unlock the work folder, and remove it unless a run can be resumed; again does nothing."""
        if not self._lock.held or self.unfinished:
            self._lock.close()
        else:
            self.remove()


@contextmanager
def changed_folder(folder: Path) -> Iterator[Path]:
    """Yield a copy of a finished folder to change, which takes its place when the block ends.

    Unchanged files are hard links where the file system has them, also to files outside the folder to which it has
    symbolic links. Whenever the process ends, the folder is as it was or as it is to become.

    Args:
        folder: the folder.

    Raises:
        OutputError: the folder cannot be changed.
    """
    check_changeable(folder)
    folder = folder.resolve()
    work = WorkFolder(folder, _CHANGE_S)
    try:
        _check_no_run(work.path)
        work.clear()
        with output_errors(folder):
            shutil.copytree(folder, work.model, symlinks=True, copy_function=_link_or_copy)
            _replace_links_out(work.model, folder)
            _give_to_owner(work.model, folder)
        yield work.model
        replace_folder(work.model, folder)
    finally:
        work.close()


def check_changeable(folder: Path) -> None:
    """Raise OutputError unless `changed_folder` can replace a folder."""
    check_place(folder)
    _check_no_run(partial_folder(folder.resolve()))


def check_place(folder: Path) -> None:
    """Raise OutputError unless another folder can take the place of a folder."""
    folder = folder.resolve()
    if Path.cwd().is_relative_to(folder):
        raise OutputError(
            f"{folder} is the current folder, and a changed folder takes its place; change to the folder above it."
        )
    if os.path.ismount(folder):
        raise OutputError(
            f"{folder} is a mount point, whose place no other folder can take; copy the folder first."
        )
    for path in (folder, folder.parent):  # the names of both change
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise OutputError(f"{path} is not writable, and {folder} cannot be changed; copy it first.")


def _check_no_run(work: Path) -> None:
    """Raise OutputError for a run that could be resumed if its folder were not there already."""
    if (work / JOURNAL).exists() and (work / MODEL).exists():
        raise OutputError(f"{work} holds an unfinished run; finish it under another name, or delete it.")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        shutil.copy2(source, target)


def _replace_links_out(new: Path, folder: Path) -> None:
    """Replace the symbolic links that lead out of a copied folder: relative ones dangle in the place of the copy.

    Args:
        new: the copy, without links in its path.
        folder: the folder that was copied.
    """
    for link in [path for path in new.rglob("*") if path.is_symlink()]:
        target = Path(os.path.realpath(folder / link.relative_to(new)))
        inside = Path(os.path.realpath(link)).is_relative_to(new)
        if inside or not target.exists():
            continue
        link.unlink()
        if target.is_dir():  # not copied: it may hold anything, also the folder itself
            link.symlink_to(target)
        else:
            _link_or_copy(str(target), str(link))


def _give_to_owner(new: Path, folder: Path) -> None:
    """Give a folder the owner of another, where this process may."""
    owner = folder.stat()
    with suppress(OSError):
        os.chown(new, owner.st_uid, owner.st_gid)


def partial_folder(out: Path) -> Path:
    """Return the work folder of `out`."""
    return out.with_name(out.name + PARTIAL)


def can_resume(out: Path) -> bool:
    """Return True if an unfinished run of `out` can be resumed."""
    return (partial_folder(user_path(out, SUFFIX_BYTES)) / JOURNAL).exists()


def is_work_folder(path: Path) -> bool:
    """Return True if a folder is a work folder, or an empty one."""
    try:
        names = os.listdir(path)  # once: another process may make or remove the lock meanwhile
    except FileNotFoundError:  # removed meanwhile by the process that worked in it
        return True
    return LOCK in names or not names


def check_new(out: Path) -> None:
    """Raise OutputError when `out` exists, is being made, or was made in part by a run that can be resumed."""
    if os.path.lexists(out):
        raise OutputError(
            f"{out} exists already; choose another folder with -o, or replace this one with --overwrite "
            "(overwrite=True)."
        )
    check_no_run(out)


def check_no_run(out: Path) -> None:
    """Raise OutputError when `out` is being made, or was made in part by a run that can be resumed."""
    work = partial_folder(out)
    if (holder := holder_of(work)) is not None:
        raise OutputError(f"Another process{holder} is writing {work}; wait for it, or choose another folder.")
    if (work / JOURNAL).exists():
        raise OutputError(
            f"{work} holds an unfinished run; continue it with --resume, or delete it to start anew."
        )


def check_not_interrupted(folder: Path) -> None:
    """Check that no process ended between the two renames of `replace_folder`, where a folder has lost its name.

    Readers change nothing; the next writer gives the folder its name back.

    Raises:
        CheckpointError: there is no folder, and its earlier version is in its work folder.
    """
    if os.path.exists(folder):
        return
    real = Path(os.path.realpath(folder))  # work folders are next to the folder and not to a link to it
    work = partial_folder(real)
    previous = previous_folder(work / MODEL)
    if not os.path.isdir(previous):
        return
    if (holder := holder_of(work)) is not None:
        raise CheckpointError(f"Another process{holder} is replacing {folder}; open it again in a moment.")
    raise CheckpointError(
        f"There is no folder {folder}, because a process was interrupted while it replaced it; restore the "
        f"earlier version, which is complete (mv {shlex.quote(str(previous))} {shlex.quote(str(real))})."
    )


def remove_leftovers(out: Path) -> None:
    """Remove the work folder of a finished folder, unless another process works in it."""
    path = partial_folder(out)
    if path.is_dir() and not path.is_symlink() and is_work_folder(path):
        with suppress(OutputError):
            WorkFolder(out, 0.0).remove()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def holder_of(work: Path) -> str | None:
    """Return the process that holds the lock of a work folder, as `_holder` does; None where none does."""
    try:
        descriptor = os.open(work / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _holder(work)
    except OSError:  # a file system without locks: nobody can hold one
        return None
    finally:
        os.close(descriptor)


def _holder(folder: Path) -> str:
    """Return the id of the process that a lock file names, for a sentence; empty where it names none."""
    try:
        text = (folder / LOCK).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
    process, _, host = text.strip().partition(" ")
    if not process.isdigit():
        return ""
    return f" ({process})" if host in ("", socket.gethostname()) else f" ({process} on {host})"


def _open_lock(path: Path) -> int:
    """Open a lock file, which no link may stand for: its bytes are overwritten."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
        os.close(descriptor)
        raise OutputError(f"{path} is a link or no regular file, and cannot be a lock; remove it.")
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Return True if an open file still has its name."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))
