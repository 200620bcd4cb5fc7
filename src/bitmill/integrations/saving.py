"""`save_pretrained` of a quantized model into a folder that holds a model already."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import MethodType
from typing import Any

from bitmill.checkpoint.contents import REPORT
from bitmill.checkpoint.reader import is_bitmill_folder
from bitmill.config.paths import user_path
from bitmill.errors import OutputError
from bitmill.sources.hf import INDEX, SINGLE


def protect_saves(model: Any) -> None:
    """Make `model.save_pretrained` refuse folders with a record, and leave one version of the weights in others.

    transformers writes one file or shards with an index, and removes no file or index of an earlier save that is
    then left over. It tells a quantizer only the model and not the folder, so the method of the model is replaced.

    Args:
        model: a model of transformers.
    """
    model.save_pretrained = MethodType(_protected(type(model).save_pretrained), model)


def _protected(save: Any) -> Any:
    @functools.wraps(save)
    def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        folder = user_path(save_directory)
        if (folder / REPORT).exists() and is_bitmill_folder(folder):
            raise OutputError(
                f"{folder} is a folder that bitmill wrote, with a record of its files ({REPORT}), which a save "
                "would contradict; save the model into another folder."
            )
        before = {name: _version(folder / name) for name in (SINGLE, INDEX)}
        saved = save(model, save_directory, *args, **options)
        written = [name for name in before if _version(folder / name) not in (None, before[name])]
        if len(written) == 1:
            (stale,) = {*before} - {*written}
            (folder / stale).unlink(missing_ok=True)
        return saved

    return save_pretrained


def _version(path: Path) -> tuple[int, int] | None:
    """Return what distinguishes a file from a later one of its name; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
