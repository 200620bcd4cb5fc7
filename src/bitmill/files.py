"""Files that appear complete or not at all, also after a power cut.

The bytes of a file reach the disk before the file gets its name, and its name before anything that relies on it is
done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitmill.errors import OutputError

_CHUNK_BYTES = 1 << 20
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn every error of writing to `path` into an OutputError of one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            reason = "the disk is full; free some space and run again"
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "the folder is not writable; choose another with -o"
        elif code == errno.ELOOP:
            reason = "it is a link, which is not followed; remove it"
        elif code in (errno.ENOTDIR, errno.EEXIST):
            reason = "a part of the path is a file; choose another folder with -o"
        else:
            reason = f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise OutputError(f"{path} cannot be written: {reason}.") from None


def new_file(path: Path) -> None:
    """Make an empty file; one or a link that has the name is removed, and never written through."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))


def replace_file(path: Path, write: Callable[[Path], object], *, shared: bool = False, sync: bool = True) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it.

    The temporary file is always a new one: what a killed run left is removed, and a link of that name is not
    followed.

    Args:
        path: the file.
        write: function that writes to the path with which it is called.
        shared: several processes may write the file at once, with equal bytes.
        sync: flush the file to the disk; not needed for one that no later run reads.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    with output_errors(path):
        try:
            new_file(temporary)
            write(temporary)
            if sync:
                _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if sync:
            _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all.

    Names of files that are not UTF-8 are in Python half surrogates, which are written as escapes that JSON reads.
    """
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8", errors="backslashreplace"))


def create_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all, unless there is one; of several processes the first one wins."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write_text(temporary, text)
    with output_errors(path):
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write readable JSON in the order of `data`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    *,
    shared: bool = False,
    sync: bool = True,
) -> None:
    """Write a safetensors file, complete or not at all.

    Args:
        path: the file.
        tensors: name -> tensor; equal tensors give equal bytes.
        metadata: at most one key, because the order of several is not defined.
        shared: several processes may write the file at once, with equal bytes.
        sync: flush the file to the disk; not needed for one that no later run reads.
    """
    packed = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    def write(new: Path) -> None:
        save_file(packed, new, metadata or {"format": "pt"})
        os.chmod(new, 0o666 & ~_umask())  # the library makes files that only their owner can read

    replace_file(path, write, shared=shared, sync=sync)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flush all files of a folder, and its names, to the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _sync(path)


def publish(folder: Path, out: Path) -> None:
    """Flush a finished folder to the disk and rename it to `out`."""
    with output_errors(out):
        sync_folder(folder)
        os.rename(folder, out)
        for parent in (out.parent, folder.parent):
            _sync(parent)


def replace_folder(new: Path, folder: Path) -> None:
    """Flush a folder to the disk and let it take the place of another, which is then at `new`.

    The system exchanges both names in one step where it can. Elsewhere there are two renames, and for a moment no
    folder of the name: the earlier one is then at `previous_folder(new)`.
    """
    with output_errors(folder):
        sync_folder(new)
        try:
            _exchange(new, folder)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
                raise
            os.rename(folder, previous_folder(new))
            os.rename(new, folder)
            os.rename(previous_folder(new), new)
        for parent in (folder.parent, new.parent):
            _sync(parent)


def previous_folder(new: Path) -> Path:
    """Return the place of a folder that `replace_folder` is about to replace by `new`."""
    return new.with_name("previous")


def _exchange(one: Path, other: Path) -> None:
    """Exchange two names in one step. Raises OSError, ENOSYS where the system has no such call."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(one), os.fsencode(other))
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        current = -100  # AT_FDCWD
        failed = libc.renameat2(current, names[0], current, names[1], 2)  # RENAME_EXCHANGE
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


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


def xxh3(path: Path) -> str:
    """Return the 128-bit XXH3 digest (hex) of a file, which takes as long as reading it from memory."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:  # not mapped: an error of the disk would end the process
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return str(digest.hexdigest())


def tensors_digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the 128-bit XXH3 digest (hex) of names, types, shapes and bytes of tensors, and of a text.

    Args:
        tensors: name -> tensor, in any order.
        text: any text.
    """
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = xxhash.xxh3_128(json.dumps([described, text]).encode())
    for name in names:
        content: Any = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(content)
    return str(digest.hexdigest())


def file_record(path: Path) -> dict[str, Any]:
    """Return the entry of a file under `files` of report.json."""
    return {"sha256": sha256(path), "size_bytes": path.stat().st_size, "xxh3": xxh3(path)}


def file_records(folder: Path, but: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return name -> record of every file below `folder` except `but`, in the order of their paths."""
    files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: file_record(file) for name, file in files.items() if name not in but}


def folder_bytes(folder: Path) -> int:
    """Return the total size of the files below `folder`."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
