"""Open a model by name, path, Hub id, or as a live module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitmill.config.paths import user_path
from bitmill.errors import SourceError
from bitmill.sources.base import Source
from bitmill.sources.hub import hub_files, is_hub_id, origin_of_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def open_source(
    model: str | Path | nn.Module,
    *,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Source:
    """Open a model.

    Args:
        model: a demo model by name, a Hugging Face folder, a .gguf file, a live module, or a Hub id,
            org/name or org/name@revision.
        trust_remote_code: allow Python code that comes with the model.
        tokenizer: tokenizer of a live module; every other source has its own.

    Raises:
        SourceError: `model` is none of these, or is damaged.
    """
    from torch import nn

    from bitmill.sources import zoo
    from bitmill.sources.gguf import GgufSource
    from bitmill.sources.hf import HfSource
    from bitmill.sources.module import ModuleSource

    if isinstance(model, nn.Module):
        return ModuleSource(model, tokenizer=tokenizer)
    if not str(model).strip():
        raise SourceError(f"No model was named; give a folder, a .gguf file or one of {_zoo_names()}.")
    if isinstance(model, str) and model in zoo.ZOO:
        fetched = zoo.fetch(model)
        return HfSource(fetched, name=model) if fetched.is_dir() else GgufSource(fetched, name=model)
    path = user_path(model)
    if path.is_dir():
        return HfSource(path, origin=origin_of_folder(path), trust_remote_code=trust_remote_code)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"{path} is a file but not a .gguf one; give the folder that holds the model.")
        return GgufSource(path)
    if isinstance(model, Path) or not is_hub_id(model):
        raise SourceError(
            f"There is no model at {str(model)!r}; give a folder, a .gguf file, a Hub id such as 'org/name', "
            f"or one of the demo models: {_zoo_names()}."
        )
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]
    folder, origin = hub_files(model, patterns + ["*.py"] * trust_remote_code)
    return HfSource(folder, name=model, hub=True, origin=origin, trust_remote_code=trust_remote_code)


def _zoo_names() -> str:
    """Return the names of the demo models for a message."""
    from bitmill.sources import zoo

    return ", ".join(sorted(zoo.ZOO))
