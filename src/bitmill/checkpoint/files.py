"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitmill.errors import OutputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the ways in which writing to `path` fails into one sentence."""
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
    """Write a text file: to a temporary name first, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, readable and in the order of `data`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file the same way; equal tensors give equal bytes."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, {"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # the library makes files that only their owner can read
        os.replace(temporary, path)


def _umask() -> int:
    """What this process withholds from the permissions of new files; it can only be read by setting it."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Size of every file below `folder`."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
