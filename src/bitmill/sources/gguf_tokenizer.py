"""Tokenizers that transformers converts from the metadata of GGUF files, kept in the cache.

The conversion takes seconds to minutes for large vocabularies. An entry of the cache is named by all it depends
on, the bytes of the metadata and the releases of the libraries; its files are compared with a recorded digest, and
an entry that was damaged is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bitmill.errors import SourceError, one_line
from bitmill.sources.base import digest_of
from bitmill.sources.cache import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES, _DIGEST = "files", "sha256"  # inside an entry
SMALLEST_BYTES = 1 << 18  # metadata of fewer bytes are converted in an instant, and not kept


def gguf_tokenizer(path: Path, metadata_bytes: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file, converted at its first use.

    Args:
        path: the file.
        metadata_bytes: bytes from its start to the end of the metadata.

    Raises:
        SourceError: The metadata describe no tokenizer.
    """
    if metadata_bytes < SMALLEST_BYTES:
        return _convert(path)
    entry = _entry(path, metadata_bytes)
    tokenizer = _load(entry)
    if tokenizer is None:
        tokenizer = _convert(path)
        # an optional copy: without it the tokenizer is converted again next time
        with contextlib.suppress(OSError):
            _keep(tokenizer, entry)
    return tokenizer


def _entry(path: Path, metadata_bytes: int) -> Path:
    """Return the folder in the cache for the metadata of a file and the installed libraries."""
    import gguf
    import tokenizers
    import transformers

    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(metadata_bytes))
    releases = (transformers.__version__, tokenizers.__version__, getattr(gguf, "__version__", ""))
    digest.update(" ".join(releases).encode())
    return cache_folder() / "tokenizers" / digest.hexdigest()[:32]


def _convert(path: Path) -> PreTrainedTokenizerBase:
    """Convert the tokenizer in the metadata of a file. Raises SourceError."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except Exception as error:  # the conversion trusts the metadata
        raise SourceError(
            f"{path} describes no tokenizer that can be built ({one_line(error)}); "
            "give the tokenizer of the original model."
        ) from error


def _load(entry: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of an entry; None where there is none, or it is damaged."""
    from transformers import PreTrainedTokenizerFast

    try:
        if digest_of(entry / _FILES) != (entry / _DIGEST).read_text(encoding="ascii"):
            return None
        folder = entry / _FILES
        options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = folder / "chat_template.jinja"
        if template.is_file():
            options["chat_template"] = template.read_text(encoding="utf-8")
        # not from_pretrained, which parses the vocabulary four times
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **options)
    except Exception:  # an entry that cannot be read is made again
        return None


def _keep(tokenizer: PreTrainedTokenizerBase, entry: Path) -> None:
    """Write an entry, in place of a damaged one. Raises OSError."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=entry.parent) as scratch:
        made = Path(scratch, "entry")
        tokenizer.save_pretrained(str(made / _FILES))
        (made / _DIGEST).write_text(digest_of(made / _FILES), encoding="ascii")
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(made, entry)  # fails where another process was first, with an equal entry
