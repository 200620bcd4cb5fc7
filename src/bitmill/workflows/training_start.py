"""The quantized folder from which `train` starts where it is given a float model and a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from bitmill.checkpoint.overwrite import check_new_folder
from bitmill.config.paths import user_path
from bitmill.data.windows import CalibrationData
from bitmill.errors import UsageError
from bitmill.progress import Progress
from bitmill.recipes.method import Method
from bitmill.recipes.recipe import Recipe
from bitmill.workflows.quantize.run import quantize

START = "-start"  # after the name of the trained folder


def start_folder(out: Path) -> Path:
    """Return the folder that `quantized_start` writes for a trained folder."""
    return out.with_name(out.name + START)


def quantized_start(
    model: str | Path,
    method: str | Path | Recipe | Method,
    options: dict[str, Any],
    out: Path,
    *,
    calibration: CalibrationData | Tensor | None,
    resume: bool,
    overwrite: bool,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> Path:
    """Quantize a float model into the folder `start_folder(out)`.

    Args:
        model: the float model.
        method: how it is quantized.
        options: of the method.
        out: the folder that training is to write, which is checked before the first block is quantized.
        calibration: text that the method reads, and that training reads again.
        resume: continue an interrupted run, or take the finished folder of one.
        overwrite: replace folders that bitmill wrote.
        device: to run on.
        trust_remote_code: allow Python code in the model to run.
        progress: where progress is reported.

    Returns:
        The folder.

    Raises:
        BitmillError: anything wrong with model, method, text or disk, in one sentence.
    """
    check_new_folder(out, overwrite, resume)
    place = start_folder(out)
    for path in (out, place):
        if path.resolve() == user_path(model).resolve():
            raise UsageError(f"{path} is the model itself; choose another folder with -o.")
    request: dict[str, Any] = {
        "calib": calibration, "resume": resume, "overwrite": overwrite, "measure": 0, "device": device,
        "trust_remote_code": trust_remote_code, "progress": progress,
    }  # fmt: skip
    if taken := sorted(options.keys() & {*request, "out"}):
        raise UsageError(f"{taken[0]} is no option of a method; give it to train itself.")
    quantize(model, method, out=place, **request, **options)
    return place
