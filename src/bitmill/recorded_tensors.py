"""Safetensors files whose metadata record a digest of all else that they hold, and plain data of the writer.

The digest is of the contents and lies in the file, so that a file and its digest appear together.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from bitmill.config.documents import load_json
from bitmill.files import tensors_digest, write_tensors

_DIGEST = "xxh3"


def write_recorded(
    path: Path, key: str, tensors: dict[str, Tensor], about: dict[str, Any], *, shared: bool = False
) -> None:
    """Write tensors, plain data and the digest of both, complete or not at all.

    Args:
        path: the file.
        key: of the metadata.
        tensors: name -> tensor.
        about: plain data.
        shared: several processes may write the file at once, with equal bytes.
    """
    digest = tensors_digest(tensors, json.dumps(about))
    write_tensors(path, tensors, {key: json.dumps({**about, _DIGEST: digest})}, shared=shared)


def read_recorded(path: Path, key: str, unrecorded: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the plain data of a file after its digest was compared.

    Args:
        path: the file.
        key: of the metadata.
        unrecorded: keys of the plain data that files of earlier versions have, which record no digest. Where such
            a file lacks `key`, its metadata are the plain data.

    Raises:
        ValueError: the contents are not those that were written.
        OSError, SafetensorError: the file cannot be read.
    """
    if not path.is_file():  # a FIFO would block
        raise ValueError("it is missing, or no regular file")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = load_json(metadata[key]) if key in metadata else dict(metadata)
    if not isinstance(about, dict):
        raise ValueError("its metadata are no object")
    recorded = about.pop(_DIGEST, None)
    if recorded is None and not set(about) <= set(unrecorded):
        raise ValueError("its digest is missing")
    if recorded is not None and recorded != tensors_digest(tensors, json.dumps(about)):
        raise ValueError("it was altered since it was written: its digest differs")
    return tensors, about
