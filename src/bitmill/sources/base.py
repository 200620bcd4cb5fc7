"""The contract of a source, which provides the weights, the config and the tokenizer of a float model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bitmill.errors import SourceError, one_line
from bitmill.sources.hub import HubOrigin

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class StoredType:
    """A type of numbers in a file of quantized weights.

    Attributes:
        type: its name, such as "Q4_K".
        bits_per_weight: bits of a weight, scales included.
        share: of the model's weights that have it, 0 to 1.
    """

    type: str
    bits_per_weight: float
    share: float


@runtime_checkable
class Source(Protocol):
    """A float model whose tensors are read one at a time.

    name: name for messages and reports ("smollm2-135m", the name of a folder).
    config: transformers config of the model.
    trust_remote_code: code that comes with the model may run.
    as_saved: names are those of a checkpoint, which transformers may rename when it loads it; False where they are
        those of the model.
    states_dtype: the dtype of its tensors is the one in which the model was published.
    origin: where on the Hub it comes from; None where it does not, or where that is not known.
    """

    name: str
    config: PretrainedConfig
    trust_remote_code: bool
    as_saved: bool
    states_dtype: bool
    origin: HubOrigin | None

    def names(self) -> list[str]:
        """Return the state-dict names of the stored tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor, as `tensor` returns it, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own. Raises SourceError for an unknown name."""
        ...

    def stored_types(self) -> list[StoredType]:
        """Return the types that weights are stored in, most weights first; [] where all are floats."""
        ...

    def fingerprint(self) -> str:
        """Return the sha256 (hex) over the config and all weights; computed once per object."""
        ...

    def write_auxiliary_files(self, folder: Path) -> None:
        """Write the files besides weights and config.json (tokenizer, chat template, licence) to `folder`."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises SourceError where there is none."""
        ...

    def processor(self, class_name: str) -> Any:
        """Return what prepares pictures or sound.

        Args:
            class_name: class of transformers that loads it, such as "AutoImageProcessor".

        Raises:
            SourceError: there is none.
        """
        ...

    def pooling(self) -> str:
        """Return how hidden states of an encoder become one embedding, see `bitmill.sources.pooling`."""
        ...


def save_auxiliary(what: str, save: Callable[[str], object], folder: Path) -> None:
    """Save an object of transformers into a folder.

    Args:
        what: its name, for messages.
        save: its `save_pretrained`.
        folder: the folder.

    Raises:
        SourceError: the library refuses to save it.
    """
    try:
        save(str(folder))
    except OSError:
        raise
    except Exception as error:  # the classes validate, each in its own way
        raise SourceError(f"The {what} cannot be saved ({one_line(error)}); change or remove it.") from None


def hash_file(digest: Any, path: Path) -> None:
    """Add the bytes of a file to a hashlib digest, CHUNK_BYTES at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    digest = hashlib.sha256()
    hash_file(digest, path)
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    """Return the files of a folder, sorted by name, or the file itself."""
    return sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]


def digest_of(path: Path) -> str:
    """Return the sha256 (hex) of a file; of a folder, that of the lines `sha256sum` prints for its files."""
    if not path.is_dir():
        return sha256_of(path)
    lines = [f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in files_of(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def config_bytes(config: PretrainedConfig) -> bytes:
    """Return the config as bytes to hash, without its path and the version of transformers."""
    plain = config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        plain.pop(key, None)
    return json.dumps(plain, sort_keys=True, default=str).encode()
