"""A source: where the weights, the config and the tokenizer of a model come from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CHUNK_BYTES = 1 << 22


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

    def write_auxiliary_files(self, folder: Path) -> None:
        """Copy what is neither weights nor config.json (tokenizer, chat template, licence) into `folder`."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or a SourceError."""
        ...

    def pooling(self) -> str:
        """How an encoder's hidden states become one embedding, see `bitmill.sources.pooling`."""
        ...


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
