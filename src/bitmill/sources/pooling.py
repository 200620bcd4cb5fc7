"""The pooling that turns hidden states of an encoder into one embedding, from the folder of a sentence encoder.

    modules.json           the modules in order: Transformer, Pooling, Normalize
    1_Pooling/config.json  the pooling mode

The mean over tokens is the default, as in sentence-transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill.config.documents import read_json
from bitmill.errors import SourceError
from bitmill.sources.config_bounds import MAX_CONFIG_BYTES

MEAN = "mean"
_MODES = {
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


def read_pooling(folder: Path) -> str:
    """Return "mean", "cls" or "max".

    Raises:
        SourceError: The description is damaged, or embeddings pass other modules or modes.
    """
    chosen = MEAN
    for module in sentence_modules(folder):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            chosen = _mode(folder / str(module["path"]) / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise SourceError(
                f"The embeddings of {folder} pass a module {kind!r}, which is not supported; leave out measuring "
                "(--measure 0)."
            )
    return chosen


def sentence_modules(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of modules.json; empty where there is no such file.

    Raises:
        SourceError: The file is damaged, or a path leaves the folder.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return []
    modules = _json(file)
    for module in modules if isinstance(modules, list) else [None]:
        path = module.get("path") if isinstance(module, dict) else None
        if not isinstance(path, str) or Path(path).name != path or path == "..":
            raise SourceError(f"{file} does not list modules inside its folder; fetch it again.")
    return list(modules)


def _mode(file: Path) -> str:
    """Return the pooling of the config.json of a Pooling module."""
    plain = _json(file)
    flags = plain if isinstance(plain, dict) else {}
    modes = [key for key, value in flags.items() if key.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise SourceError(
            f"{file} sets {', '.join(modes) or 'no pooling'}, and one of {', '.join(_MODES)} is "
            "supported; leave out measuring (--measure 0)."
        )
    return _MODES[modes[0]]


def _json(file: Path) -> Any:
    """Return the content of a JSON file. Raises SourceError."""
    return read_json(file, SourceError, MAX_CONFIG_BYTES, "fetch it again")
