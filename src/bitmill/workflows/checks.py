"""What is settled before the first block: what will be stored, which tokens are read, what identifies the job."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.files import folder_bytes
from bitmill.checkpoint.writer import work_of
from bitmill.data import text
from bitmill.errors import OutputError, UsageError
from bitmill.recipes.compose import find_recipe, with_head
from bitmill.recipes.defaults import leading_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.sources.base import Source
from bitmill.version import __version__


def settled_recipe(
    method: str | Path | Recipe | None, options: dict[str, Any], head_bits: int | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe that is meant, and for the summary why it was `chosen`, where nobody named one.

    head_bits: of embedding and head, instead of what the recipe says of them.
    """
    if isinstance(method, Recipe):
        if options:
            raise UsageError(f"A Recipe is complete; change it instead of passing {', '.join(options)}.")
        return with_head(method, head_bits), {}
    if method is not None:
        return with_head(find_recipe(str(method), options), head_bits), {}
    recipe, reason = leading_recipe(options)
    return with_head(recipe, head_bits), {"chosen": reason}


def job_identity(
    source: Source,
    recipe: Recipe | None,
    calib: Tensor | None,
    held_out: text.Windows | None,
    described: dict[str, Any],
    device: str,
    propagate: str = "quantized",
    kv: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result.

    recipe: None where weights stay as they are.  kv: method and calibration text of keys and values.
    """
    import numpy
    import safetensors
    import transformers

    return {
        "source": source.name,  # named in the report and the card
        "model": source.fingerprint(),
        "recipe": recipe.to_dict() if recipe is not None else None,
        **({"kv": kv} if kv else {}),
        "calibration": described["calibration"],
        "propagate": propagate if calib is not None else None,
        "held_out": None if held_out is None else text.windows_hash(held_out),
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
    """Refuse a job that cannot fit on the disk before it has cost hours.

    What an unfinished run wrote already needs no more space.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    try:
        held = folder_bytes(work_of(out) / "model")
    except OSError:  # another process is writing there, which the sink will refuse
        held = 0
    if free + held < size_bytes:
        raise OutputError(
            f"The result needs {(size_bytes - held) / 1e6:.0f} MB and {parent} has {free / 1e6:.0f} MB free; "
            "free some space or choose another folder with -o."
        )


def check_device(device: str) -> None:
    """Raises UsageError for a device that torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"The device {device!r} is not available here ({reason}); use --device cpu.") from None
