"""Open a model by name, path, Hub id, or as a live module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitmill.config.paths import user_path
from bitmill.errors import SourceError, one_line
from bitmill.sources.base import Source

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
        model: a demo model by name, a Hugging Face folder, a .gguf file, a live module, or a Hub id.
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
        return HfSource(path, trust_remote_code=trust_remote_code)
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
    folder = hub_files(model, patterns + ["*.py"] * trust_remote_code)
    return HfSource(folder, name=model, hub=True, trust_remote_code=trust_remote_code)


def _zoo_names() -> str:
    """Return the names of the demo models for a message."""
    from bitmill.sources import zoo

    return ", ".join(sorted(zoo.ZOO))


def is_hub_id(model: str) -> bool:
    """Return True if this is the id of a model on the Hub and no path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    # a path that was mistyped must not turn into a request to the network
    if model.startswith((".", "/", "~")) or model.endswith((".gguf", ".safetensors", ".bin")):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def hub_files(model: str, patterns: list[str]) -> Path:
    """Download files of a model on the Hub.

    Args:
        model: Hub id, "org/name".
        patterns: glob patterns of the files.

    Returns:
        The folder of the snapshot in the cache of the Hub.

    Raises:
        SourceError: The Hub or the model cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the network, a proxy or the Hub
        # the cause is more useful than "no cached snapshot"
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise SourceError(
            f"{model!r} is no local path and could not be fetched from the Hub ({one_line(cause or error)}); "
            f"check the name and the network, or use a demo model: {_zoo_names()}."
        ) from error
