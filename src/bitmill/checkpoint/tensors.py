"""The tensors of a quantized folder: the files that transformers reads, and the headers in them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from bitmill.checkpoint.contents import is_inside, read_json
from bitmill.errors import CheckpointError, SourceError, quoted
from bitmill.sources.hf import INDEX, SINGLE
from bitmill.sources.safetensors_header import TensorEntry, read_header


def open_tensors(folder: Path) -> tuple[dict[str, Path], dict[str, TensorEntry], set[str]]:
    """Read the headers of the files that hold the model's tensors.

    transformers loads a single file where there is one, otherwise every tensor of the shards that the index names,
    listed or not. So there must be one or the other and not both, and the index must list what the shards hold.

    Returns:
        Tensor name -> file; tensor name -> header entry; the names of the files, and of the index.

    Raises:
        CheckpointError: a file is missing or damaged, or is not in the folder, or there are both a single file and
            an index.
    """
    if (folder / SINGLE).exists():
        if os.path.lexists(folder / INDEX):
            raise CheckpointError(
                f"{folder} holds both {SINGLE}, which transformers reads, and {INDEX}, which names other files; "
                "move the one that is no part of the model elsewhere."
            )
        return _open_shards(folder, None, {SINGLE})
    index = read_json(folder, INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder}/{INDEX} has no 'weight_map'; quantize again.")
    sound: set[str] = set()
    for name, shard in index.items():
        if not isinstance(shard, str) or not (shard in sound or _is_name(shard)):
            raise CheckpointError(
                f"The index of {folder} places {quoted(name)} at {quoted(shard)}, outside the folder."
            )
        sound.add(shard)
    files, entries, opened = _open_shards(folder, index, set(index.values()))
    return files, entries, {*opened, INDEX}


def _is_name(shard: str) -> bool:
    """Return True for the name of a file, without a folder."""
    return "\0" not in shard and Path(shard).name == shard and shard not in ("", ".", "..")


def _open_shards(
    folder: Path, index: dict[str, str] | None, shards: set[str]
) -> tuple[dict[str, Path], dict[str, TensorEntry], set[str]]:
    files: dict[str, Path] = {}
    entries: dict[str, TensorEntry] = {}
    root = folder.resolve()
    for shard in sorted(shards):
        path = folder / shard
        if not is_inside(root, path):
            raise CheckpointError(
                f"The shard {path} is a link that leaves the folder, to {os.path.realpath(path)}; copy the folder "
                f"with its links followed (cp -rL {shlex.quote(str(folder))} NEW) and use the copy."
            )
        try:
            header = read_header(path)
        except SourceError as error:
            raise CheckpointError(str(error)) from None
        for name, entry in header.items():
            if index is not None and index.get(name) != shard:
                raise CheckpointError(
                    f"The shard {path} holds the tensor {quoted(name)}, which the index does not place there; the "
                    "folder is damaged, copy it again."
                )
            files[name], entries[name] = path, entry
    if index is not None and (absent := next((name for name in index if name not in entries), None)):
        raise CheckpointError(
            f"The shard {folder / index[absent]} holds no tensor {quoted(absent)}, which the index promises."
        )
    return files, entries, shards
