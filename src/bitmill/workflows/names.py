"""Names of folders for results that were given none."""

from __future__ import annotations

import re
from pathlib import Path

from bitmill.kv.scheme import KVMethod
from bitmill.recipes.recipe import Recipe

_MAX_CHARACTERS = 80  # of a model's name


def model_name(model: str) -> str:
    """Return a model's name for a folder: `smollm2-135m`, `name` of org/name@revision, or a file's stem."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() else path.name.partition("@")[0]
    name = re.sub(r"[^\w.-]+", "-", name.removesuffix(".gguf")).strip("-.")
    return name[:_MAX_CHARACTERS] or "model"


def default_name(model: str, recipe: Recipe | None, kv: KVMethod | None) -> str:
    """Return the name of the folder of a quantized model, such as `smollm2-135m-gptqt-3bit`.

    Args:
        model: the model, as named by the user.
        recipe: of the weights; None where they stay as they are.
        kv: method of keys and values, if any.
    """
    words = [model_name(model)]
    if recipe is not None:
        words += [re.sub(r"[^\w.-]+", "-", recipe.name), f"{recipe.default.format.rate:g}bit"]
    if kv is not None:
        words += ["kv", kv.name, f"{kv.bits}bit"]
    return "-".join(words)
