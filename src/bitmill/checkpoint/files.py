"""Files that appear complete or not at all, also after a power cut.

The bytes of a file reach the disk before the file gets its name, and its name before anything that relies on it is
done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitmill.errors import OutputError


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn every error of writing to `path` into an OutputError of one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            reason = "the disk is full; free some space and run again with --resume"
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "the folder is not writable; choose another with -o"
        elif code in (errno.ENOTDIR, errno.EEXIST):
            reason = "a part of the path is a file; choose another folder with -o"
        else:
            reason = f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise OutputError(f"{path} cannot be written: {reason}.") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file: to a temporary name, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with output_errors(path):
        # half a surrogate pair, as in names that are not UTF-8, becomes an escape sequence, which JSON reads back
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        _name(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write readable JSON in the order of `data`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file: to a temporary name, flushed to the disk, then renamed.

    Args:
        path: the file.
        tensors: name -> tensor; equal tensors give equal bytes.
        metadata: at most one key, because the order of several is not defined.
    """
    temporary = path.with_name(path.name + ".tmp")
    with output_errors(path):
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata or {"format": "pt"})
        os.chmod(temporary, 0o666 & ~_umask())  # the library makes files that only their owner can read
        _name(temporary, path)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def publish(folder: Path, out: Path) -> None:
    """Flush a finished folder to the disk and rename it to `out`."""
    with output_errors(out):
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        os.rename(folder, out)
        for parent in (out.parent, folder.parent):
            _sync(parent)


def _name(temporary: Path, path: Path) -> None:
    """Rename a file from its temporary name to its own."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # some file systems cannot flush a folder, and some folders may be written but not read
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _umask() -> int:
    """Return the permissions that this process withholds from new files; they can only be read by setting them."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path, but: Collection[str] = ()) -> dict[str, str]:
    """Return name -> sha256 of every file below `folder` except `but`, in the order of their paths."""
    files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: sha256(file) for name, file in files.items() if name not in but}


def folder_bytes(folder: Path) -> int:
    """Return the total size of the files below `folder`."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
