"""A source: where the weights, the config and the tokenizer of a model come from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bitmill.errors import SourceError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CHUNK_BYTES = 1 << 22
QUOTED_CHARACTERS = 200


@runtime_checkable
class Source(Protocol):
    """A float model, opened lazily: nothing is held in memory but what was asked for.

    name: what the user calls it ("smollm2-135m", a folder's name).
    trust_remote_code: whether code shipped with the model may run; False unless the user asked for it.
    """

    name: str
    config: PretrainedConfig
    trust_remote_code: bool

    def names(self) -> list[str]:
        """State-dict names of the stored tensors, in the spelling of transformers; a tied head is absent."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which `tensor` returns it, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; the caller owns the memory. Raises SourceError for an unknown name."""
        ...

    def fingerprint(self) -> str:
        """sha256 (hex) over the config and every weight byte; computed once per object."""
        ...

    def write_side_files(self, folder: Path) -> None:
        """Copy what is neither weights nor config.json (tokenizer, chat template, licence) into `folder`."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or a SourceError."""
        ...

    def pooling(self) -> str:
        """How an encoder's hidden states become one embedding, see `bitmill.models.pooling`."""
        ...


def open_source(
    model: str | Path | nn.Module,
    *,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Source:
    """Open a demo model by name, a Hugging Face folder, a .gguf file, a live module, or a Hub id.

    tokenizer: what a live module is to be used with; every other source has its own.

    Raises SourceError, one sentence, when `model` is none of these or is damaged.
    """
    from torch import nn

    from bitmill.models import zoo
    from bitmill.models.gguf import GgufSource
    from bitmill.models.hf import HfSource
    from bitmill.models.module import ModuleSource

    if isinstance(model, nn.Module):
        return ModuleSource(model, tokenizer=tokenizer)
    if not str(model).strip():
        raise SourceError(f"No model was named; give a folder, a .gguf file or one of {_zoo_names()}.")
    if isinstance(model, str) and model in zoo.ZOO:
        fetched = zoo.fetch(model)
        return HfSource(fetched, name=model) if fetched.is_dir() else GgufSource(fetched, name=model)
    path = Path(model).expanduser()
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
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]
    folder = hub_files(model, wanted + ["*.py"] * trust_remote_code)
    return HfSource(folder, name=model, hub=True, trust_remote_code=trust_remote_code)


def hash_file(digest: Any, path: Path) -> None:
    """Feed a file to a hashlib digest, a few MiB at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    digest = hashlib.sha256()
    hash_file(digest, path)
    return digest.hexdigest()


def config_bytes(config: PretrainedConfig) -> bytes:
    """The config as bytes to hash: what describes the model, not where it lay or which version read it."""
    plain = config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        plain.pop(key, None)
    return json.dumps(plain, sort_keys=True, default=str).encode()


def in_short(error: BaseException) -> str:
    """What a library said, on one line and without a final full stop, to quote inside a sentence."""
    text = (" ".join(str(error).split()) or type(error).__name__).rstrip(".:")
    return text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS].rstrip() + "..."


def _zoo_names() -> str:
    from bitmill.models import zoo

    return ", ".join(sorted(zoo.ZOO))


def is_hub_id(model: str) -> bool:
    """Whether this names a model on the Hub and no path."""
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
    """A folder with the files of a Hub id that match the patterns. Raises SourceError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # whatever the network, the proxy or the Hub came up with
        # "no cached snapshot" says little, what kept the Hub from answering says more
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise SourceError(
            f"{model!r} is no local path and could not be fetched from the Hub ({in_short(cause or error)}); "
            f"check the name and the network, or use a demo model: {_zoo_names()}."
        ) from error
