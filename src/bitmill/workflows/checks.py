"""Checks before the first block, the choice of the recipe, and the identity of a job."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from bitmill.calibration.token_windows import JobData
from bitmill.checkpoint.work_folder import partial_folder
from bitmill.data import text
from bitmill.errors import OutputError, UsageError, one_line, quoted
from bitmill.files import folder_bytes
from bitmill.recipes.compose import HeadBits, find_recipe, with_head
from bitmill.recipes.defaults import leading_recipe
from bitmill.recipes.method import Method
from bitmill.recipes.recipe import Recipe
from bitmill.sources.base import Source
from bitmill.version import __version__


def choose_recipe(
    method: str | Path | Recipe | Method | None, options: dict[str, Any], head_bits: HeadBits | None = None
) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe of the arguments, or the leader of the leaderboard.

    Args:
        method: a `Recipe`, a `Method` with its options, a method's name, a recipe file, or None for the leader.
        options: options of the method.
        head_bits: bits of embedding and head in place of those of the recipe.

    Returns:
        The recipe, and the summary's entry `chosen` that explains the choice, empty where a method was named.
    """
    if isinstance(method, (Recipe, Method)):
        if options:
            raise UsageError(
                f"A {type(method).__name__} is complete; change it instead of passing {', '.join(options)}."
            )
        return with_head(method if isinstance(method, Recipe) else method.recipe(), head_bits), {}
    if method is not None:
        return with_head(find_recipe(str(method), options), head_bits), {}
    recipe, reason = leading_recipe(options)
    return with_head(recipe, head_bits), {"chosen": reason}


def job_identity(
    source: Source,
    recipe: Recipe | None,
    data: JobData,
    device: str,
    propagate: str = "quantized",
    kv: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that decides the bytes of the result, as plain data.

    Args:
        source: the float model.
        recipe: the recipe; None where the weights stay as they are.
        data: the tokens that calibrate and that measure.
        device: the device that computes.
        propagate: input of later blocks during calibration.
        kv: method and calibration text of keys and values.
    """
    return {
        "source": source.name,  # named in the report and the card
        "model": source.fingerprint(),
        "recipe": recipe.to_dict() if recipe is not None else None,
        **({"kv": kv} if kv else {}),
        "calibration": data.described["calibration"],
        "propagate": propagate if data.windows is not None else None,
        "held_out": None if data.held_out is None else text.windows_hash(data.held_out),
        **machine_identity(device),
    }


def machine_identity(device: str) -> dict[str, Any]:
    """Return the versions and the parts of the machine that decide how floats are rounded, as plain data."""
    import numpy
    import safetensors
    import transformers

    return {
        "versions": {
            "bitmill": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": numpy.__version__,
        },
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),  # which vector instructions torch's kernels use
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


def check_space(out: Path, size_bytes: int) -> None:
    """Raise OutputError for a result that does not fit on the disk; files of an unfinished run count as written.

    Args:
        out: the folder to write.
        size_bytes: size of the result.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    try:
        held = folder_bytes(partial_folder(out) / "model")
    except OSError:  # another process is writing there, which the sink will refuse
        held = 0
    if free + held < size_bytes:
        raise OutputError(
            f"The result needs {(size_bytes - held) / 1e6:.0f} MB and {parent} has {free / 1e6:.0f} MB free; "
            "free some space or choose another folder with -o."
        )


def check_device(device: str) -> None:
    """Raise UsageError for a device that torch does not have on this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
        reason = one_line(error)
        raise UsageError(f"The device {quoted(device)} is not available ({reason}); use --device cpu.") from None
